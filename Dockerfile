# SPDX-License-Identifier: Apache-2.0
# A server in a container (docs/serving.md):
#   docker build -t fastdllm .
#   docker build -t fastdllm:cuda --build-arg TORCH_BACKEND=cu128 --build-arg EXTRAS=serve,gpu .
# BASE: a Debian image with Python 3.10 or later. TORCH_BACKEND: the build of torch, cpu or cu128 and the like, as uv names
# them; torch brings its CUDA libraries, so the machine needs only a driver and NVIDIA's container toolkit.
ARG BASE=python:3.12-slim
FROM ${BASE}

ARG TORCH_BACKEND=cpu
ARG EXTRAS=serve
WORKDIR /app

# Triton compiles with a C compiler when a kernel first runs.
RUN if [ "$TORCH_BACKEND" != cpu ]; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends gcc libc6-dev \
        && rm -rf /var/lib/apt/lists/*; \
    fi

# What decides about the environment comes first, so that a change of the code does not install it anew.
COPY pyproject.toml requirements.txt README.md LICENSE ./
COPY scripts/setup_env.sh scripts/
COPY fastdllm/__init__.py fastdllm/
RUN pip install --no-cache-dir uv \
    && UV_NO_CACHE=1 UV_TORCH_BACKEND="$TORCH_BACKEND" bash -ec "source scripts/setup_env.sh $EXTRAS"
COPY fastdllm fastdllm

# Models of the hub, and compiled kernels, are kept under this user's home.
RUN useradd --create-home --uid 1000 fastdllm && install -d -o fastdllm -g fastdllm /home/fastdllm/.cache
USER fastdllm
ENV PATH=/app/.venv/bin:$PATH PYTHONUNBUFFERED=1

EXPOSE 8000
HEALTHCHECK --start-period=10m --interval=30s --timeout=5s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["fastdllm", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["tiny-llada"]
