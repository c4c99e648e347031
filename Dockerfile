# docker build -t rlhf-lib .
# docker run --rm -v "$PWD/runs:/rlhf/runs" rlhf-lib                    the study and its report, into ./runs
# docker run --rm --gpus all rlhf-lib make report PROFILE=full         on a GPU
# docker build --build-arg PIP_ARGS="..." .                            what PIP_ARGS says goes to pip
FROM python:3.11-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /rlhf
ARG PIP_ARGS=""
ENV PIP_NO_CACHE_DIR=1

# The dependencies first: this layer is built again only when they, or how they are installed, change.
COPY Makefile pyproject.toml requirements.lock README.md LICENSE ./
COPY rlhf_lib/__init__.py rlhf_lib/__init__.py
RUN make setup PIP_ARGS="$PIP_ARGS"

COPY . .
CMD ["make", "report"]
