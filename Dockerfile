# One image for every role: controller, node, storage. Build: make image.
#
# Debian's own Python keeps pip and compilers out of the final stage, and its security updates in it. The tools that
# make filesystems are those of the oldest supported release on purpose: newer mkfs.xfs and mke2fs turn on features
# that the kernels of older nodes cannot mount.
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# Where pip finds packages, if not at PyPI; nothing of it reaches the final stage.
ARG PIP_CONFIG_FILE
WORKDIR /src
COPY requirements/runtime.txt requirements/build.txt requirements/
RUN python3 -m venv /build \
 && /build/bin/pip install --require-hashes --only-binary :all: -r requirements/build.txt \
 && python3 -m venv /opt/nvmesh-csi \
 && /opt/nvmesh-csi/bin/pip install --require-hashes --only-binary :all: -r requirements/runtime.txt
COPY pyproject.toml ./
COPY csi_driver csi_driver
RUN /build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
 && /opt/nvmesh-csi/bin/pip install --no-deps /wheels/*.whl \
 && /opt/nvmesh-csi/bin/pip uninstall --yes pip setuptools

FROM ${BASE}
RUN apt-get update \
 && apt-get install -y --no-install-recommends \
    btrfs-progs ca-certificates cryptsetup-bin e2fsprogs mount python3 util-linux xfsprogs \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/debconf/* /var/log/*.log /var/log/apt
COPY --from=build /opt/nvmesh-csi /opt/nvmesh-csi

ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="nvmesh-csi" \
      org.opencontainers.image.description="Container Storage Interface driver for NVMesh" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

ENV PATH=/opt/nvmesh-csi/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin PYTHONUNBUFFERED=1
# The controller needs no rights at all. The node and the storage manager make mounts and devices: their pods say
# runAsUser: 0 and privileged: true.
USER 65532:65532
ENTRYPOINT ["nvmesh-csi"]
CMD ["--help"]
