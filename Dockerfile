# The main job in a container; runs are written to the folder that is mounted at /runs:
#   docker build -t marginclip . && docker run --rm -v "$PWD/runs:/runs" marginclip
# Any other command follows the name: docker run --rm marginclip audit victim.path=...
FROM python:3.12-slim

# Options for pip, such as an index of smaller builds of torch for machines without a GPU: --build-arg PIP_OPTIONS="--extra-index-url ..."
ARG PIP_OPTIONS=""

WORKDIR /marginclip
COPY . .
RUN pip install --no-cache-dir $PIP_OPTIONS . \
    && useradd --create-home user \
    && mkdir /runs \
    && chown user /runs

USER user
WORKDIR /home/user
VOLUME /runs
ENTRYPOINT ["marginclip"]
CMD ["defend", "attack=badnet", "defense=mmdf", "runs_dir=/runs"]
