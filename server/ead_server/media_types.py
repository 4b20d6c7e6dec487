"""The forms in which answers of many tokens are written."""

JSON = "application/json"
NDJSON = "application/x-ndjson"
SAFETENSORS = "application/vnd.safetensors"
FRAMES = "application/vnd.safetensors-seq"  # each preceded by its length, uint64 little-endian
FORMATS = {JSON: "json", NDJSON: "ndjson", SAFETENSORS: "safetensors", FRAMES: "safetensors-seq"}
