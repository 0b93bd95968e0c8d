# SPDX-License-Identifier: Apache-2.0
"""What exists only for the drivers 1.4 and 1.9 of this name, and the version after which each part can go.

Configuration (`docs/upgrading.md` shows its new form). Can go after version 1:

* ConfigMap, `topology` JSON and `apiParams` as clusters file: `csi_driver.compat.clusters`, and its callers in
  `csi_driver.management.clusters` (with `ManagementSettings.password`) and `csi_driver.config`
* `--older-topology-file`, the ConfigMap in which 1.4 lists the nodes of each zone: `csi_driver.config`, and
  `csi_driver.management.clusters.read_cluster_names`
* the label `nvmesh-csi/client-status`, by which workloads are scheduled: `csi_driver.kubernetes.node_object`

StorageClasses, Secrets and volumes, which are used as long as a volume of these drivers exists. Can go after version 2:

* `encryption: dmcrypt`, `dmcrypt/type`, `dmcrypt/cipher`, `dmcryptKey`, passphrases up to a line feed:
  `csi_driver.compat.volumes`, and its callers in `csi_driver.parameters.encryption` and `csi_driver.node.encryption`
* `csi_metadata`, and the metadata of volumes that this driver did not create: `csi_driver.compat.volumes`,
  `csi_driver.controller.volume_metadata.read_creation`, `csi_driver.controller.create_volume`
* the zone `single-zone-cluster` in a handle: `csi_driver.model.DEFAULT_ZONE`,
  `csi_driver.controller.volume_lookup.zones_of`
* handles without a reference id; the volume's name identifies the driver of an attachment: `csi_driver.host.devices`
"""
