# docker build --build-arg EXTRA=tpu -t mllama-jax .      (or EXTRA=cuda)
FROM python:3.11-slim

ARG EXTRA=tpu

WORKDIR /opt/mllama_jax
COPY . .
RUN pip install --no-cache-dir ".[${EXTRA},gcs,data,guided,watch]" \
    && useradd --create-home runner \
    && mkdir /cache \
    && chown runner /cache

USER runner
ENTRYPOINT ["mllama-jax"]
CMD ["--help"]
