# docker build -t reproducible-experiments .
# docker run --rm reproducible-experiments                      the whole pipeline on the sample data
# docker run --rm -it reproducible-experiments bash             a shell; make help lists the rest
FROM python:3.12-slim

# DVC and MLflow ask git for the commit; trainer.compile=true on a GPU needs a C compiler.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc git libc6-dev make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home researcher \
    && install --directory --owner=researcher /repo

USER researcher
WORKDIR /repo
# A cache in a layer is never read again.
ENV UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1

# The environment (what running needs) is a layer of its own: a change to the code does not install it again.
COPY --chown=researcher Makefile pyproject.toml requirements.lock requirements-dev.lock ./
RUN make setup

# With .git, so that a run records the commit it came from.
COPY --chown=researcher . .

CMD ["make", "repro"]
