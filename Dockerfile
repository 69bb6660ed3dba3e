# Images of `arl`: `docker build --target cpu .`, or `--target cuda` for NVIDIA GPUs. docs/docker.md says how to use them.

ARG NODE=node:20.20.2-bookworm-slim
ARG RUST=rust:1.95.0-slim-bookworm

FROM ${NODE} AS node

# What builds: Rust, a C compiler and Node, on the release of Debian that the images have, so that the C library is theirs.
FROM ${RUST} AS tools
COPY --from=node /usr/local/bin/node /usr/local/bin/node
COPY --from=node /usr/local/lib/node_modules /usr/local/lib/node_modules
RUN ln -s ../lib/node_modules/npm/bin/npm-cli.js /usr/local/bin/npm \
    && ln -s ../lib/node_modules/npm/bin/npx-cli.js /usr/local/bin/npx
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
ENV ARL_CACHE=/tmp/cache
COPY . .

FROM tools AS built
RUN npm run build \
    && npm prune --omit=dev --no-audit --no-fund \
    && mkdir /package \
    && cp -r LICENSE package.json index.d.ts binding.cjs binding.d.ts dist page node_modules ./*.node /package/

FROM tools AS built-cuda
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-pip \
    && rm -rf /var/lib/apt/lists/*
RUN npm run build:cuda \
    && npm prune --omit=dev --no-audit --no-fund \
    && mkdir /package \
    && cp -r LICENSE package.json index.d.ts binding.cjs binding.d.ts dist page node_modules ./*.node /package/
# NVIDIA's libraries, of the versions that the addon was built with.
RUN python3 -m pip install --no-cache-dir --no-deps --target /libraries -r crates/arl-cuda-libraries/libraries.txt

# What runs: nothing but Node. Measured choices of matrix products are kept in /cache.
FROM ${NODE} AS runtime
RUN ln -s /opt/arl/dist/cli/main.js /usr/local/bin/arl \
    && mkdir /work /cache \
    && chown 1000:1000 /work /cache
ENV NODE_ENV=production \
    ARL_CACHE=/cache
WORKDIR /work
ENTRYPOINT ["arl"]
CMD ["--help"]

FROM runtime AS cuda
COPY --from=built-cuda /libraries/nvidia /opt/nvidia
COPY --from=built-cuda /package /opt/arl
# NVIDIA's container runtime adds the driver.
ENV ARL_CUDA_LIBRARIES=/opt/nvidia/*/lib \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000

# The last stage is what `docker build .` makes.
FROM runtime AS cpu
COPY --from=built /package /opt/arl
USER 1000:1000
