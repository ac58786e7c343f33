# qswitch on one NVIDIA GPU.
#
#   docker build -t qswitch .
#   docker run --rm --gpus all qswitch doctor
#   docker run --rm -it --gpus all --user "$(id -u):$(id -g)" \
#     -v "$PWD:/work" -v qswitch-cache:/cache -e HF_TOKEN \
#     qswitch distill --preset llama-7b-to-1b --set data.train=my_prompts.jsonl
#
# Commands run in /work, the user's folder, so every path means what it means outside. Any user id works: what is written
# besides goes to /cache, which all may write.
#
# The host needs the NVIDIA driver and the NVIDIA Container Toolkit. CUDA's libraries come with the torch wheel of PyPI
# (Linux x86-64), so a plain Python image is enough.
FROM python:3.12-slim

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    HF_HOME=/cache/huggingface \
    QSWITCH_CACHE=/cache/qswitch \
    HOME=/cache/home \
    USER=qswitch

WORKDIR /opt/qswitch

# By far the largest layer, and the one that changes least.
COPY constraints.txt ./
RUN pip install -c constraints.txt torch

COPY pyproject.toml README.md LICENSE ./
COPY presets presets
COPY qswitch qswitch
RUN pip install -c constraints.txt '.[gguf,tracking]'

# A named volume takes these permissions over when it is first used.
RUN mkdir -p /work /cache/huggingface /cache/qswitch /cache/home && chmod -R a+rwX /work /cache
VOLUME ["/work", "/cache"]

WORKDIR /work
ENTRYPOINT ["qswitch"]
CMD ["--help"]
