# Default MoE on an NVIDIA image that has PyTorch and Transformer Engine. Nothing of the image is
# replaced: docker/packages.py adds what is missing, by hash, and fails the build if torch, TE or
# any other package of the image changed. docs/launch.md says how to build and run it.
#
#   docker build -t megatron-default-moe .
#   docker build -t megatron-default-moe --build-arg APEX=1 .        with NVIDIA Apex, from source
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3

FROM ${BASE_IMAGE} AS apex
ARG APEX=0
ARG APEX_SOURCE=https://github.com/NVIDIA/apex
ARG APEX_COMMIT=6424da3b4faa6c8f062da4a48c424fff3f02d42d
ARG CUDA_ARCHS="9.0;10.0"
COPY docker/apex.sh /tmp/
RUN /tmp/apex.sh /wheels

FROM ${BASE_IMAGE}
WORKDIR /opt/megatron_default_moe
COPY docker/install.sh docker/packages.py docker/
COPY requirements/docker.txt requirements/
RUN --mount=type=bind,from=apex,source=/wheels,target=/wheels docker/install.sh /wheels
COPY pyproject.toml setup.py README.md LICENSE ./
COPY megatron_default_moe megatron_default_moe
COPY examples examples
RUN python -m pip install --no-cache-dir --no-deps --no-build-isolation .
COPY tools tools
COPY docker/smoke.py docker/

# `docker run --user` works too: nothing above is written to at run time.
RUN useradd --create-home --uid 10001 moe
USER 10001
WORKDIR /workspace
RUN python /opt/megatron_default_moe/tools/doctor.py --building-image && \
    python /opt/megatron_default_moe/docker/smoke.py
