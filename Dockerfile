# qswitch on one NVIDIA GPU.
#
#   docker build -t qswitch .
#   docker run --rm --gpus all qswitch doctor
#   docker run --rm -it --gpus all \
#     -v "$PWD/data:/data:ro" -v "$PWD/runs:/runs" -v qswitch-cache:/cache -e HF_TOKEN \
#     qswitch distill --preset llama-7b-to-1b --set data.train=/data/my_prompts.jsonl
#
# The host needs the NVIDIA driver and the NVIDIA Container Toolkit. CUDA's libraries come with the torch wheel of PyPI
# (Linux x86-64), so a plain Python image is enough.
FROM python:3.12-slim

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    HF_HOME=/cache/huggingface \
    QSWITCH_CACHE=/cache/qswitch

WORKDIR /opt/qswitch

# By far the largest layer, and the one that changes least.
COPY constraints.txt ./
RUN pip install -c constraints.txt torch

COPY pyproject.toml README.md LICENSE ./
COPY presets presets
COPY qswitch qswitch
RUN pip install -c constraints.txt '.[gguf,tracking]'

RUN mkdir -p /data /runs /cache/huggingface /cache/qswitch
VOLUME ["/data", "/runs", "/cache"]

# Run directories default to ./runs, which is /runs from here.
WORKDIR /
ENTRYPOINT ["qswitch"]
CMD ["--help"]
