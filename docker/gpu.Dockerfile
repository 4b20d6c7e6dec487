# The server and the trainer on SGLang's own image, which already holds SGLang, torch and CUDA.
FROM python:3.11-slim AS build
WORKDIR /app
COPY . .
RUN pip wheel --no-deps -w /wheels .

FROM lmsysorg/sglang:v0.5.23
COPY --from=build /wheels /wheels
RUN pip install "$(ls /wheels/ead-*.whl)[trainer]" && rm -r /wheels
WORKDIR /app
COPY docker/with-keys.sh docker/with-keys.sh
COPY examples examples
RUN useradd --create-home ead && mkdir -p /models /runs && chown ead /models /runs
USER ead
ENV EAD_CACHE=/models
EXPOSE 30000
ENTRYPOINT ["ead"]
CMD ["serve", "--host", "0.0.0.0", "--port", "30000"]
