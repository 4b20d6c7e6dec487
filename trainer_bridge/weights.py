# TEMPORARY
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from trainer_bridge.settings import Settings


class SyncConfig(Settings):
    kind: str = "disk"
    source: str = "/tmp/dev/tiny"


@dataclass
class SyncReport:
    seconds: dict
    num_bytes: int


class P:
    def __init__(self, client, config):
        self.client, self.source = client, config.source

    def publish(self, tensors, version):
        import shutil

        t0 = time.time()
        with tempfile.TemporaryDirectory() as d:
            for f in Path(self.source).glob("*.json"):
                shutil.copy(f, d)
            state = {n: t.cpu().contiguous().clone() for n, t in tensors}
            save_file(state, d + "/model.safetensors", metadata={"format": "pt"})
            self.client.request(
                "POST",
                "/update_weights_from_disk",
                {"model_path": d, "weight_version": str(version)},
                repeatable=True,
                admin=True,
            )
        return SyncReport({"all": time.time() - t0}, sum(t.nbytes for t in state.values()))

    def close(self):
        pass


def make_publisher(client, config):
    return P(client, config)
