# docker build -t hf_plm .                                                    (CPU)
# docker build -t hf_plm --build-arg BASE=nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04 .   (GPU)
# docker run --gpus all -v "$PWD:/work" hf_plm pretrain mine --data.train proteins.fasta.gz --run.folder runs/mine
ARG BASE=ubuntu:24.04
FROM ${BASE}

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

# The user of the image owns what a run writes; give another id to match the owner of a mounted folder.
ARG UID=1001
RUN useradd --create-home --uid ${UID} plm && mkdir /work && chown plm /work

ENV VIRTUAL_ENV=/opt/hf_plm PATH=/opt/hf_plm/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE CHANGELOG.md ./
COPY hf_plm hf_plm
COPY launch launch
COPY accelerate_configs accelerate_configs
RUN python3 -m venv /opt/hf_plm \
    && pip install --no-cache-dir --constraint constraints.txt .

USER plm
WORKDIR /work
ENTRYPOINT ["hf-plm"]
CMD ["--help"]
