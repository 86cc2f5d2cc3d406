# docker build -t rlhf-pipeline .
# docker run --gpus all -v "$PWD:/work" -v hf-cache:/cache rlhf-pipeline run recipe.yaml
FROM python:3.11-slim

# What Triton and bitsandbytes compile with on a GPU.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt torch
COPY pyproject.toml README.md LICENSE CHANGELOG.md ./
COPY rlhf_pipeline ./rlhf_pipeline
COPY recipes ./recipes
RUN pip install --no-cache-dir --constraint constraints.txt . && rm -rf /src

RUN useradd --create-home --uid 1000 trainer && mkdir /cache /work && chown trainer /cache /work
USER trainer
ENV HF_HOME=/cache
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["rlhf-pipeline"]
