# Tally with all it needs. Not built in CI, and not built yet by hand: no machine with Docker was at hand.
#
#   docker build -t tally --build-arg TORCH_INDEX=URL .      CPU: the URL of torch's CPU builds, which its own site lists
#   docker build -t tally --build-arg BASE=nvidia/cuda:12.8.1-devel-ubuntu24.04 .      CUDA: what the package index serves
#   docker run --rm -it -v "$PWD/data:/tally/data" -v "$PWD/checkpoints:/tally/checkpoints" tally python launch/train.py --config configs/toy.yaml
#   docker run --gpus all --shm-size 8g ...                                              for GPUs: NCCL talks through shared memory
#
# The base must have apt and Python 3.11 or newer; a CUDA base must be a -devel one, for DeepSpeed looks for nvcc.
ARG BASE=ubuntu:24.04
FROM ${BASE}

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# a virtual environment, for the Python of a CUDA base belongs to its system
ENV PATH=/venv/bin:$PATH
ARG TORCH_INDEX=
RUN python3 -m venv /venv && pip install --no-cache-dir ${TORCH_INDEX:+--index-url $TORCH_INDEX} "torch>=2.10,<2.14"

WORKDIR /tally
COPY . .
RUN pip install --no-cache-dir -e ".[data,fast]"

# checkpoints and data are the user's: docker run --user "$(id -u):$(id -g)" writes them as theirs
CMD ["python", "launch/train.py", "--help"]
