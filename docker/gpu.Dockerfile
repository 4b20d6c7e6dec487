# The server on SGLang's own image, which already holds SGLang and its CUDA packages.
FROM lmsysorg/sglang:v0.5.23
WORKDIR /app
COPY . .
RUN pip install --no-deps . && pip install typer rich httpx numpy pydantic gguf accelerate
RUN useradd --create-home ead && mkdir -p /models && chown ead /models
USER ead
ENV EAD_CACHE=/models
EXPOSE 30000
ENTRYPOINT ["ead"]
CMD ["serve", "--host", "0.0.0.0", "--port", "30000"]
