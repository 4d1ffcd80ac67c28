# Three images of one code, tagged VERSION-STAGE as the chart expects them (docs/install.md):
#   docker build --target pipeline .   submits the pipeline, and runs its steps that need no torch (cluster.small_image)
#   docker build --target serve .      the student server; no kfp
#   docker build --target train .      runs every step (cluster.image or TEEFUSION_IMAGE), and the default
# The base is pinned to an exact version here; CI adds its digest: --build-arg PYTHON_IMAGE=python:TAG@sha256:DIGEST
ARG PYTHON_IMAGE=python:3.11.15-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt setuptools wheel
COPY pyproject.toml README.md LICENSE ./
COPY teefusion ./teefusion
COPY components ./components
COPY pipelines ./pipelines
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /dist .

# What runs: a user of its own, who owns nothing but the home. Kubernetes mounts whatever else is written to.
FROM ${PYTHON_IMAGE} AS base
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
# The commit that this is built from, for the registry's lineage: --build-arg COMMIT=$(git rev-parse HEAD)
ARG COMMIT=""
ENV TEEFUSION_COMMIT=${COMMIT}
RUN useradd --uid 1000 --user-group --create-home teefusion
COPY constraints.txt /opt/teefusion/
WORKDIR /home/teefusion

FROM base AS pipeline
# Arguments for pip, such as an index that has CPU builds of torch.
ARG PIP_ARGS=""
RUN --mount=type=bind,from=build,source=/dist,target=/dist \
    pip install ${PIP_ARGS} --constraint /opt/teefusion/constraints.txt "$(ls /dist/*.whl)[pipeline,steps]"
# A number, so that Kubernetes can check runAsNonRoot.
USER 1000:1000
CMD ["teefusion", "--help"]

FROM base AS serve
ARG PIP_ARGS=""
RUN --mount=type=bind,from=build,source=/dist,target=/dist \
    pip install ${PIP_ARGS} --constraint /opt/teefusion/constraints.txt "$(ls /dist/*.whl)[train,serve]"
USER 1000:1000
EXPOSE 8080
CMD ["teefusion", "serve", "--help"]

FROM pipeline AS train
USER root
# DeepSpeed and Triton compile kernels when they are first used, which takes a C++ compiler at run time.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
ARG PIP_ARGS=""
# kfp stays: the code that a KFP step runs begins with `import kfp`.
RUN --mount=type=bind,from=build,source=/dist,target=/dist \
    pip install ${PIP_ARGS} --constraint /opt/teefusion/constraints.txt "$(ls /dist/*.whl)[pipeline,steps,train,lora]" setuptools wheel
# After torch and beside it, or its build sees no torch.
RUN --mount=type=bind,from=build,source=/dist,target=/dist \
    DS_BUILD_OPS=0 pip install ${PIP_ARGS} --no-build-isolation --constraint /opt/teefusion/constraints.txt \
    "$(ls /dist/*.whl)[deepspeed]"
USER 1000:1000
