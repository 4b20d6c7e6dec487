# The server (and the trainer) without a GPU: the same steps as `make venv` on such a machine.
FROM python:3.11-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY . .
RUN make venv

FROM python:3.11-slim
# torch compiles a few of SGLang's functions when they are first called
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ libc6-dev libnuma1 \
    && rm -rf /var/lib/apt/lists/* && useradd --create-home ead && mkdir /models /runs && chown ead /models /runs
COPY --from=build --chown=ead /app /app
USER ead
WORKDIR /app
ENV PATH=/app/.venv/bin:$PATH EAD_CACHE=/models
EXPOSE 30000
ENTRYPOINT ["ead"]
CMD ["serve", "--host", "0.0.0.0", "--port", "30000"]
