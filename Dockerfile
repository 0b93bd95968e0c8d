# SPDX-License-Identifier: Apache-2.0
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
COPY pyproject.toml LICENSE ./
COPY csi_driver csi_driver
RUN /build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
 && /opt/nvmesh-csi/bin/pip install --no-deps /wheels/*.whl \
 && /opt/nvmesh-csi/bin/pip uninstall --yes pip setuptools
# Each Python package's terms, under its name: its licence files, and its metadata, which name the licence in any case.
RUN cd /opt/nvmesh-csi/lib/python3*/site-packages \
 && for info in *.dist-info; do \
        mkdir -p "/licenses/$info" && cp "$info/METADATA" "/licenses/$info/" \
        && find "$info" -type f \( -iname '*licen[cs]e*' -o -iname 'copying*' -o -iname 'notice*' -o -iname 'authors*' \) \
               -exec cp --parents {} /licenses/ ';' || exit 1 ; \
    done

FROM ${BASE}
RUN apt-get update \
 && apt-get install -y --no-install-recommends \
    btrfs-progs ca-certificates cryptsetup-bin e2fsprogs kmod mount python3 util-linux xfsprogs \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/debconf/* /var/log/*.log /var/log/apt
COPY --from=build /opt/nvmesh-csi /opt/nvmesh-csi

# The licences of what was put in: Debian's packages keep theirs in /usr/share/doc.
COPY --from=build /licenses /licenses
COPY LICENSE /licenses/nvmesh-csi-driver/

ARG VERSION=dev
ARG REVISION=unknown
# Whoever publishes the image gives names of their own, and counts the builds of one version.
ARG VENDOR=nvmesh-csi
ARG MAINTAINER=nvmesh-csi
ARG RELEASE=1
# Without a prefix: what certifications ask for.
LABEL org.opencontainers.image.title="nvmesh-csi" \
      org.opencontainers.image.description="Container Storage Interface driver for NVMesh" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.vendor="${VENDOR}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      name="nvmesh-csi" \
      vendor="${VENDOR}" \
      maintainer="${MAINTAINER}" \
      version="${VERSION}" \
      release="${RELEASE}" \
      summary="CSI driver for NVMesh" \
      description="Container Storage Interface driver for NVMesh: controller, node and embedded storage manager"

# Each thread would get a heap of its own: with one for all, a controller with 100 calls at once is 11 MiB smaller.
ENV PATH=/opt/nvmesh-csi/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin PYTHONUNBUFFERED=1 \
    MALLOC_ARENA_MAX=1
# The controller needs no rights at all. The node and the storage manager make mounts and devices: their pods say
# runAsUser: 0 and privileged: true.
USER 65532:65532
ENTRYPOINT ["nvmesh-csi"]
CMD ["--help"]
