{{/* Checks of values against each other, which the schema cannot express. */}}
{{- define "nvmesh-csi.validate" -}}
{{- $v := .Values -}}
{{- $embedded := include "nvmesh-csi.isEmbedded" . -}}
{{- $clusters := include "nvmesh-csi.clusters" . -}}
{{- $needsManagement := or (not $v.nodeComponentOnly) (eq $v.attachBy "node") -}}
{{- if and $needsManagement (not (or $embedded $clusters $v.management.servers)) -}}
{{- fail "no storage management is set: set management.servers, management.zones or management.existingClusters, or storage.enabled for the embedded manager" -}}
{{- end -}}
{{- if and $clusters $v.management.servers -}}
{{- fail "management.servers and a description of several clusters (management.zones or management.existingClusters) are both set: set only one" -}}
{{- end -}}
{{- $existing := $v.management.existingClusters -}}
{{- if or (and $existing.secret $existing.configMap) (and $v.management.zones (or $existing.secret $existing.configMap)) -}}
{{- fail "management.zones, management.existingClusters.secret and management.existingClusters.configMap: more than one is set: set only one" -}}
{{- end -}}
{{- if and $v.management.servers (not (or $v.management.existingSecret $v.management.tls.clientCertificateSecret)) -}}
{{- fail "management.servers has no credentials: name a Secret in management.existingSecret, or in management.tls.clientCertificateSecret" -}}
{{- end -}}
{{- range $zone, $cluster := $v.management.zones -}}
{{- $tls := $cluster.tls | default dict -}}
{{- if not (or $cluster.existingSecret $tls.clientCertificateSecret $v.management.existingSecret $v.management.tls.clientCertificateSecret) -}}
{{- fail (printf "management.zones.%s has no credentials: name a Secret in its existingSecret or tls.clientCertificateSecret, or one for all zones in management.existingSecret" $zone) -}}
{{- end -}}
{{- end -}}
{{- if and $v.storage.enabled $v.nodeComponentOnly -}}
{{- fail "nodeComponentOnly and storage.enabled are both true: the embedded manager needs the controller of its release; set one of them to false" -}}
{{- end -}}
{{- if and $v.storage.enabled (not $v.storage.nodeName) -}}
{{- fail "storage.enabled is true and storage.nodeName is empty: name the Kubernetes node that holds the pool; on another node the manager would start with an empty pool" -}}
{{- end -}}
{{- $name := printf "%s-storage" (include "nvmesh-csi.fullname" .) -}}
{{- if and $v.storage.enabled (not (regexMatch "^[a-z][a-z0-9-]*$" $name)) -}}
{{- fail (printf "name of the storage's Service: expected letters, digits and '-', the first a letter, got %s: set fullnameOverride, or rename the release" $name) -}}
{{- end -}}
{{- if and $v.storage.drive $v.storage.poolDirectory -}}
{{- fail "storage.drive and storage.poolDirectory are both set: the pool is on the drive, or in the directory; set only one" -}}
{{- end -}}
{{- if not (regexMatch "^(/dev/(disk/by-(id|path)|[^/]+)/[^/]+)?$" $v.storage.drive) -}}
{{- fail (printf "storage.drive: expected a name that the drive keeps, got %s, which may be another drive after a reboot; name it as /dev/disk/by-id/NAME, /dev/mapper/NAME, /dev/md/NAME or /dev/VG/LV" $v.storage.drive) -}}
{{- end -}}
{{- if and $v.storage.drive (not $v.storage.enabled) -}}
{{- fail "storage.drive is set and storage.enabled is false: the drive belongs to the embedded manager; set storage.enabled to true" -}}
{{- end -}}
{{- include "nvmesh-csi.validateExport" . -}}
{{- include "nvmesh-csi.validateSnapshots" . -}}
{{- $daemonSets := dict "node" $v.node -}}
{{- range $name, $own := $v.additionalDaemonSets -}}
{{- $_ := set $daemonSets (printf "additionalDaemonSets.%s" $name) (mergeOverwrite (deepCopy $v.node) (deepCopy $own)) -}}
{{- end -}}
{{- include "nvmesh-csi.validateByName" (dict "place" "" "value" (omit $v "global")) -}}
{{- include "nvmesh-csi.validatePods" . -}}
{{- include "nvmesh-csi.validateRollout" (dict "place" "controller" "strategy" $v.controller.updateStrategy) -}}
{{- range $place, $node := $daemonSets -}}
{{- include "nvmesh-csi.validateRollout" (dict "place" $place "strategy" $node.updateStrategy "isDaemonSet" true) -}}
{{- include "nvmesh-csi.validateGrace" (dict "role" $place "values" $node) -}}
{{- end -}}
{{- include "nvmesh-csi.validateParameters" (dict "place" "storageClasses" "classes" $v.storageClasses "known" (include "nvmesh-csi.storageClassParameters" .)) -}}
{{- include "nvmesh-csi.validateParameters" (dict "place" "volumeAttributesClasses" "classes" $v.volumeAttributesClasses "known" (include "nvmesh-csi.volumeAttributesClassParameters" .)) -}}
{{- range list "volumeAttributesClasses" "volumeSnapshotClasses" "volumeGroupSnapshotClasses" -}}
{{- include "nvmesh-csi.validateNames" (dict "place" . "classes" (index $v .)) -}}
{{- end -}}
{{- include "nvmesh-csi.validatePorts" . -}}
{{- include "nvmesh-csi.validateLease" .Values.sidecars.leaderElection -}}
{{- $budget := $v.controller.podDisruptionBudget -}}
{{- if and $budget.enabled (not $budget.minAvailable) (has (toString $budget.maxUnavailable) (list "0" "0%")) -}}
{{- fail (printf "controller.podDisruptionBudget.maxUnavailable: expected at least 1, got %v: no node with a controller could be drained; enabled: false removes the budget" $budget.maxUnavailable) -}}
{{- end -}}
{{- $stays := toString $budget.minAvailable -}}
{{- if and $budget.enabled (or (eq $stays "100%") (and (not (hasSuffix "%" $stays)) (ge (int $stays) (int $v.controller.replicas)) (gt (int $v.controller.replicas) 1))) -}}
{{- fail (printf "controller.podDisruptionBudget.minAvailable: expected less than the %v of controller.replicas, got %v: no node with a controller could be drained" $v.controller.replicas $stays) -}}
{{- end -}}
{{- include "nvmesh-csi.validateGrace" (dict "role" "controller" "values" $v.controller) -}}
{{- end -}}

{{/* The grace period must exceed the driver's own times. Times with units are not checked. */}}
{{- define "nvmesh-csi.validateGrace" -}}
{{- $drain := dig "drainSeconds" 30 .values.flags -}}
{{- $delay := dig "preShutdownDelay" 0 .values.flags -}}
{{- if not (or (kindIs "string" $drain) (kindIs "string" $delay)) -}}
{{- $needs := addf $drain $delay -}}
{{- if le (float64 .values.terminationGracePeriodSeconds) $needs -}}
{{- fail (printf "%s.terminationGracePeriodSeconds: expected more than the %v seconds of --drain-seconds and --pre-shutdown-delay together, got %v" .role $needs .values.terminationGracePeriodSeconds) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Volumes are exported to addresses that are given, never to others. */}}
{{- define "nvmesh-csi.validateExport" -}}
{{- $storage := .Values.storage -}}
{{- $nvme := $storage.nvme -}}
{{- if and $nvme.enabled (not $storage.enabled) -}}
{{- fail "storage.nvme.enabled is true and storage.enabled is false: volumes are exported by the embedded manager of this release; set storage.enabled to true" -}}
{{- end -}}
{{- if include "nvmesh-csi.isExported" . -}}
{{- if not $nvme.addresses -}}
{{- fail (printf "storage.nvme.addresses is empty: name the addresses of %s in the storage network; none is guessed, as every machine that reaches an export can attack it" $storage.nodeName) -}}
{{- end -}}
{{- range $nvme.addresses -}}
{{- if regexMatch "^(0\\.0\\.0\\.0|::|127\\..*|::1|169\\.254\\..*|[fF][eE]80:.*)$" . -}}
{{- fail (printf "storage.nvme.addresses: expected an address of the storage network, got %s, which is every address, or one that no other node reaches; name the machine's own address" .) -}}
{{- end -}}
{{- end -}}
{{- if not (or $storage.poolDirectory $storage.drive) -}}
{{- fail "storage.drive and storage.poolDirectory are empty: name the drive for the volumes, or a directory that exists in the filesystem of the drives; with storage.nvme.enabled it is never created, so that a drive that is not mounted is noticed" -}}
{{- end -}}
{{- if eq $storage.listenHost "[::]" -}}
{{- fail "storage.listenHost: expected an address of the node, got [::], which in the host's network (storage.nvme.enabled) is every network of the machine; name the node's address" -}}
{{- end -}}
{{- if eq .Values.attachBy "node" -}}
{{- fail "attachBy is node and storage.nvme.enabled is true: a volume of a dead node could not be moved; set attachBy to controller" -}}
{{- end -}}
{{- if and $nvme.authentication.enabled (not $storage.tls.existingSecret) -}}
{{- fail "storage.nvme.authentication.enabled is true and storage.tls.existingSecret is empty: nodes send their keys to the API, which must not cross the network in clear; name a Secret with a certificate there" -}}
{{- end -}}
{{- $range := splitList "-" $nvme.ports -}}
{{- $low := first $range | int -}}
{{- $high := last $range | int -}}
{{- if or (gt $low $high) (gt $high 65535) (ge (sub $high $low) 8192) -}}
{{- fail (printf "storage.nvme.ports: expected LOW-HIGH, at most 65535 and 8192 ports, got %s" $nvme.ports) -}}
{{- end -}}
{{- range $value, $port := dict "storage.service.port" $storage.service.port "storage.http.port" $storage.http.port "node.http.port" .Values.node.http.port -}}
{{- if and (ge (int $port) $low) (le (int $port) $high) -}}
{{- fail (printf "storage.nvme.ports: %s contains %s, %d; set different ports" $nvme.ports $value (int $port)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* csi-snapshotter ends at once, again and again, where the storage has no snapshots. */}}
{{- define "nvmesh-csi.validateSnapshots" -}}
{{- $v := .Values -}}
{{- if and $v.snapshots.enabled (not (include "nvmesh-csi.isEmbedded" .)) (not (include "nvmesh-csi.clusters" .)) -}}
{{- fail "snapshots.enabled is true, but management.servers is an NVMesh cluster, whose management API has no snapshots that CSI can use: set it to false; the embedded manager has snapshots (storage.enabled, or a zone of management.zones)" -}}
{{- end -}}
{{- if and (or $v.volumeSnapshotClasses $v.volumeGroupSnapshotClasses) (not $v.snapshots.enabled) -}}
{{- fail "volumeSnapshotClasses or volumeGroupSnapshotClasses are set, but snapshots.enabled is false, so nothing serves them: set snapshots.enabled to true, or remove the classes" -}}
{{- end -}}
{{- /* Every cluster has the first group; `helm template` without a cluster knows neither. */ -}}
{{- $apis := .Capabilities.APIVersions -}}
{{- if and $v.snapshots.enabled ($apis.Has "apiregistration.k8s.io/v1") (not ($apis.Has "snapshot.storage.k8s.io/v1")) -}}
{{- fail "snapshots.enabled is true, but this Kubernetes cluster has no VolumeSnapshots: install the CRDs and the snapshot-controller of external-snapshotter 8.7 first, see docs/snapshots.md" -}}
{{- end -}}
{{- end -}}

{{/* Ports in one pod must differ. */}}
{{- define "nvmesh-csi.validatePorts" -}}
{{- $side := .Values.sidecars -}}
{{- $probe := $side.livenessprobe.enabled -}}
{{- $controller := dict "controller.http.port" .Values.controller.http.port "statusPage.port" (ternary .Values.statusPage.port 0 .Values.statusPage.enabled) "sidecars.livenessprobe.controllerPort" (ternary $side.livenessprobe.controllerPort 0 $probe) -}}
{{- if .Values.csiAddons.enabled -}}{{- $_ := set $controller "sidecars.csiAddons.controllerPort" $side.csiAddons.controllerPort -}}{{- end -}}
{{- range splitList " " (include "nvmesh-csi.controllerSidecars" .) -}}{{- $_ := set $controller (printf "sidecars.%s.httpPort" .) (index $side .).httpPort -}}{{- end -}}
{{- $node := dict "node.http.port" .Values.node.http.port "sidecars.livenessprobe.nodePort" (ternary $side.livenessprobe.nodePort 0 $probe) -}}
{{- if .Values.csiAddons.enabled -}}{{- $_ := set $node "sidecars.csiAddons.nodePort" $side.csiAddons.nodePort -}}{{- end -}}
{{- $storage := dict "storage.http.port" .Values.storage.http.port "storage.service.port" .Values.storage.service.port -}}
{{- $pods := list -}}
{{- $onHost := dict -}}
{{- range $role, $ports := dict "controller" $controller "node" $node "storage" (ternary $storage dict .Values.storage.enabled) -}}
{{- if include "nvmesh-csi.hostNetwork" (dict "root" $ "role" $role) -}}
{{- $onHost = merge $onHost $ports -}}
{{- else -}}
{{- $pods = append $pods $ports -}}
{{- end -}}
{{- end -}}
{{- $pods = append $pods $onHost -}}
{{- range $pods -}}
{{- $taken := dict -}}
{{- range $value, $port := . -}}
{{- $key := int $port | toString -}}
{{- if and $port (hasKey $taken $key) -}}
{{- fail (printf "%s and %s are both %s: they listen in one pod, or on one host's network; set different ports" (get $taken $key) $value $key) -}}
{{- end -}}
{{- $_ := set $taken $key $value -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Sidecars exit at once with an inconsistent lease. */}}
{{- define "nvmesh-csi.validateLease" -}}
{{- if le (float64 .leaseDurationSeconds) (float64 .renewDeadlineSeconds) -}}
{{- fail (printf "sidecars.leaderElection.leaseDurationSeconds: expected more than renewDeadlineSeconds (%v), got %v" .renewDeadlineSeconds .leaseDurationSeconds) -}}
{{- end -}}
{{- if le (float64 .renewDeadlineSeconds) (mulf 1.2 .retryPeriodSeconds) -}}
{{- fail (printf "sidecars.leaderElection.renewDeadlineSeconds: expected more than 1.2 times retryPeriodSeconds (%v), got %v" .retryPeriodSeconds .renewDeadlineSeconds) -}}
{{- end -}}
{{- end -}}

{{/* Refuse before the upgrade what Kubernetes would refuse in the middle of it. */}}
{{- define "nvmesh-csi.validateDriverObject" -}}
{{- $there := lookup "storage.k8s.io/v1" "CSIDriver" "" .Values.driverName -}}
{{- $required := eq .Values.attachBy "controller" -}}
{{- if and $there (ne (dig "spec" "attachRequired" true $there) $required) -}}
{{- fail (printf "the CSIDriver object %s of this cluster has attachRequired: %t, but attachBy: %s requires %t; the field is immutable: see docs/upgrading.md for when the object may be deleted first" .Values.driverName (dig "spec" "attachRequired" true $there) .Values.attachBy $required) -}}
{{- end -}}
{{- $name := printf "%s-node" (include "nvmesh-csi.fullname" .) -}}
{{- $selector := dig "spec" "selector" "matchLabels" dict (lookup "apps/v1" "DaemonSet" .Release.Namespace $name) -}}
{{- $own := include "nvmesh-csi.selector" (dict "root" . "component" "node") | fromYaml -}}
{{- if and $selector (ne (toJson $selector) (toJson $own)) -}}
{{- fail (printf "the DaemonSet %s of this cluster selects its pods by %s, but these values by %s; selectors are immutable: keep nameOverride and the release's name, or change fullnameOverride, too" $name (toJson $selector) (toJson $own)) -}}
{{- end -}}
{{- end -}}
