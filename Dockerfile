# The service in a container: uid 1000, a root file system that may be read-only, no shell needed. `make image` builds it.
#   docker build --tag saliency-serve:cpu .
#   docker build --tag saliency-serve:cuda --build-arg DEVICE=cuda .
#   docker run --read-only --tmpfs /tmp --cap-drop ALL -p 8080:8080 saliency-serve:cpu --workers 4
# docker, podman and buildah build it alike. Read .dockerignore for what is copied into it.

ARG BASE=docker.io/library/debian:bookworm-slim

FROM ${BASE} AS build
# cpu, or cuda for NVIDIA GPUs.
ARG DEVICE=cpu
# Where torch's CPU build is linked from, a page or a folder; PyPI has only the CUDA one.
ARG TORCH_LINKS=https://download.pytorch.org/whl/cpu/torch/
# Certificates that pip trusts: a file of the build's machine where a proxy of yours signs anew (make image ARGS="--ca-bundle FILE").
ARG CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt
# hadolint ignore=DL3008  # the base's release pins them
RUN apt-get update && apt-get install --yes --no-install-recommends ca-certificates python3-venv \
 && python3 -m venv /opt/venv
WORKDIR /opt/saliency-serve
# Everything is locked, with hashes. requirements.txt has the CUDA build; the others have all but torch, and torch's CPU build.
COPY requirements.txt /tmp/locks/cuda.txt
COPY serve_config/cluster/requirements.txt /tmp/locks/cpu.txt
COPY serve_config/cluster/torch-cpu.txt /tmp/locks/torch-cpu.txt
RUN export PIP_CERT="${CA_BUNDLE}" \
 && /opt/venv/bin/pip install --no-cache-dir --no-compile --no-deps --require-hashes --requirement "/tmp/locks/${DEVICE}.txt" \
 && if [ "${DEVICE}" = cpu ]; then \
      /opt/venv/bin/pip install --no-cache-dir --no-compile --no-deps --require-hashes --find-links "${TORCH_LINKS}" \
        --requirement /tmp/locks/torch-cpu.txt; \
    fi \
 && /opt/venv/bin/pip check
# What serving does not need: pip, and headers, test programs and tests of the packages.
RUN /opt/venv/bin/pip uninstall --yes pip \
 && find /opt/venv/lib/python3*/site-packages \
      \( -path '*/torch/include' -o -path '*/torch/test' -o -path '*/torch/share' -o -path '*/torch/bin/*' ! -name torch_shm_manager \
      -o -path '*/numpy/*' -name tests -o -path '*/scipy/*' -name tests -o -path '*/sympy/*' -name tests -o -path '*/networkx/*' -name tests \) \
      -prune -exec rm --recursive --force {} +
COPY . .
# The archive with its SHA-256 (on a GPU it carries the settings for GPUs). Building it runs its smoke test, with what is left above.
# Python leaves the bytecode of all that is imported, for servers and probes that cannot write it: they start in half the time.
RUN if [ "${DEVICE}" = cuda ]; then config=serve_config/model-config-gpu.yaml; else config=serve_config/model-config.yaml; fi \
 && /opt/venv/bin/python -m scripts.packaging --model-config "${config}" \
 && /opt/venv/bin/python -m scripts.serving --help \
 && /opt/venv/bin/python -m scripts.serving.ready --help \
 && /opt/venv/bin/python -m ts.model_server --help

FROM ${BASE}
ARG VERSION=unreleased
ARG REVISION=unknown
LABEL org.opencontainers.image.title="saliency-serve" \
      org.opencontainers.image.description="A TorchServe handler that classifies handwritten digits and explains each answer with a saliency map" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="docker.io/library/debian:bookworm-slim"
# hadolint ignore=DL3008  # the base's release pins it
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3 \
 && rm --recursive --force /var/lib/apt/lists/* /var/cache/apt/* \
 && useradd --uid 1000 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin digits
# Owned by root: the server cannot change its own code.
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/saliency-serve /opt/saliency-serve
WORKDIR /opt/saliency-serve
USER 1000:1000
# The only folder that is written is /tmp.
ENV PATH=/opt/venv/bin:/usr/bin \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
EXPOSE 8080 8082
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "scripts.serving", "--cluster", "--log-dir", "/tmp/logs"]
