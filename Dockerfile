# flux2-lora with CUDA, as a user without rights of its own; models, caches and runs are in the volume /work.
#   docker build -t flux2-lora .
#   docker run --rm -it --gpus all --shm-size 8g -v $PWD/work:/work flux2-lora flux2 train +experiment=demo
#   docker compose -f docs/compose.yaml up      # the studio, and a text-encoder server on request
# Not built yet: it was written where there is no Docker engine.
FROM nvidia/cuda:12.8.1-runtime-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv gcc g++ python3-dev git tini \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/flux2 PATH=/opt/flux2/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv $VIRTUAL_ENV
# PyTorch first: it is the largest layer, and changes least. constraints.txt pins a CPU build of it.
COPY constraints.txt /src/
RUN grep -v '^torch==' /src/constraints.txt > /src/versions.txt && pip install -c /src/versions.txt 'torch>=2.11'
COPY pyproject.toml README.md LICENSE /src/
COPY flux2 /src/flux2
COPY data /src/data
COPY train /src/train
COPY conf /src/conf
RUN pip install -c /src/versions.txt '/src[optimizers,studio,tensorboard]'

# everything that is written is in the volume: outputs/ in the current folder, and what is downloaded
ENV HF_HOME=/work/.cache/huggingface FLUX2_CACHE=/work/.cache/flux2 TRITON_CACHE_DIR=/work/.cache/triton
ENV XDG_STATE_HOME=/work/.state
RUN useradd --create-home --uid 10001 flux2 && mkdir /work && chown flux2 /work
USER flux2
WORKDIR /work
VOLUME /work
ENTRYPOINT ["tini", "--"]
CMD ["flux2", "--help"]
