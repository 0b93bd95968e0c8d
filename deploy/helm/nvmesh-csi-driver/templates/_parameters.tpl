{{/* Parameters that the driver knows, separated by blanks. `make chart` writes them. */}}
{{- define "nvmesh-csi.storageClassParameters" -}}
VSGs allowAllocationOnOfflineDrives dataBlocks description diskClasses dmcrypt/cipher dmcrypt/type domain enableCrcCheck encryption encryption/allowDiscards encryption/cipher encryption/headerSize encryption/keySize encryption/numberOfSlots encryption/pbkdf encryption/pbkdfIterations encryption/pbkdfMemory encryption/slot fsType limitByDisks limitByNodes mkfs/blockSize mkfs/bytesPerInode mkfs/discard mkfs/inodeSize mkfs/reservedBlocksPercent mkfs/stripeGeometry mkfsOptions numberOfMirrors nvme/ioQueues nvme/ioTimeout parityBlocks protectionLevel raidLevel relativeRebuildPriority serverClasses stripeSize stripeWidth vpg
{{- end -}}
{{- define "nvmesh-csi.volumeAttributesClassParameters" -}}
description diskClasses enableCrcCheck limitByDisks limitByNodes relativeRebuildPriority serverClasses
{{- end -}}
