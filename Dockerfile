# The package in a container. For GPUs, with PyPI's torch, which brings CUDA:
#   docker build -t switchlora .
# For CPUs alone:
#   docker build -t switchlora:cpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
# Run it in a folder of yours:
#   docker run --rm --gpus all --ipc=host -v "$PWD:/work" switchlora pretrain --config cpu_quickstart
FROM python:3.11-slim-bookworm

# gcc: what triton compiles its launchers with; pdsh and ssh: DeepSpeed's ways to other hosts.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/*

ARG TORCH_INDEX=https://pypi.org/simple
COPY constraints.txt /src/
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple \
    -c /src/constraints.txt torch

COPY pyproject.toml setup.py README.md LICENSE /src/
COPY megatron_switchlora /src/megatron_switchlora
COPY launch /src/launch
COPY ds_configs /src/ds_configs
COPY tools/settings /src/tools/settings
RUN pip install --no-cache-dir -c /src/constraints.txt "/src[sentencepiece,wandb]" && rm -rf /src/build

WORKDIR /work
ENTRYPOINT ["switchlora"]
CMD ["--help"]
