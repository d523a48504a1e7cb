# syntax=docker/dockerfile:1
# docker build --target cpu -t vir-hf:cpu .      the CPU build of torch
# docker build --target cuda -t vir-hf:cuda .    torch with its CUDA libraries, bitsandbytes, DeepSpeed
# docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" vir-hf:cuda train experiment=quickstart
#   (where your user is not number 1000: --user "$(id -u):$(id -g)" -e HOME=/work)
#
# Linted by hadolint, but no test builds it: say so if you change it, and build it first.
# The host brings the NVIDIA driver. There is no CUDA compiler inside, so what DeepSpeed compiles at run time (the CPU
# optimizer of zero2_offload) is not available; put the cuda stage on an nvidia/cuda devel image for that.

ARG TORCH_VERSION=2.13.0

FROM python:3.12-slim-bookworm AS base
# Triton and torch.compile call a C compiler. Debian's point releases replace packages, so their versions are not pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
RUN useradd --uid 1000 --create-home vir && mkdir /work && chown vir /work

FROM base AS cpu
ARG TORCH_VERSION
RUN pip install "torch==$TORCH_VERSION" --index-url https://download.pytorch.org/whl/cpu
COPY . /source
# The package itself, whose dependencies have their bounds in setup.cfg.
# hadolint ignore=DL3013
RUN pip install "/source[fast]" && rm -rf /source
USER 1000
WORKDIR /work
ENTRYPOINT ["vir-hf"]
CMD ["--help"]

FROM base AS cuda
ARG TORCH_VERSION
RUN pip install "torch==$TORCH_VERSION"
COPY . /source
# The package itself, whose dependencies have their bounds in setup.cfg.
# hadolint ignore=DL3013
RUN pip install "/source[gpu]" && rm -rf /source
USER 1000
WORKDIR /work
ENTRYPOINT ["vir-hf"]
CMD ["--help"]
