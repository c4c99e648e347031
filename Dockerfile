# docker build -t rlhf-lib .                                   torch's usual build: for a GPU, and it runs on a CPU
# docker build -t rlhf-lib --build-arg TORCH_INDEX=URL .       a smaller one, for a CPU alone: URL is the index of
#                                                              CPU builds that PyTorch's page on installing names
# mkdir -p runs                                                where results go; else Docker makes it root's
# docker run --rm -v "$PWD/runs:/rlhf/runs" rlhf-lib           the study and its report, into ./runs
# docker run --rm -v "$PWD/runs:/rlhf/runs" --gpus all rlhf-lib make report PROFILE=full       on a GPU
#
# It works as a user of its own. For ./runs to be writable: --build-arg UID="$(id -u)".
# What PIP_ARGS says (--build-arg PIP_ARGS="...") goes to every pip install.
FROM python:3.11-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/*

ARG UID=1000
RUN useradd --create-home --non-unique --uid "$UID" rlhf && mkdir -p /rlhf/runs && chown -R rlhf /rlhf
USER rlhf
WORKDIR /rlhf

COPY --chown=rlhf . .
ARG PIP_ARGS=""
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1
RUN make setup PIP_ARGS="$PIP_ARGS ${TORCH_INDEX:+--extra-index-url $TORCH_INDEX}"

CMD ["make", "report"]
