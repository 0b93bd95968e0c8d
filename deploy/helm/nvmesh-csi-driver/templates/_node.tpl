{{/* Directories of the node, the same on the host and in the container. */}}

{{- define "nvmesh-csi.deviceDirectory" -}}
{{- .Values.node.deviceDirectory | default (ternary (include "nvmesh-csi.storageDirectory" (dict "root" . "of" "device")) "/dev/nvmesh" .Values.storage.enabled) -}}
{{- end -}}

{{- define "nvmesh-csi.statusDirectory" -}}
{{- .Values.node.statusDirectory | default (ternary (include "nvmesh-csi.storageDirectory" (dict "root" . "of" "status")) "/proc/nvmeibc" .Values.storage.enabled) -}}
{{- end -}}

{{- define "nvmesh-csi.pluginDirectory" -}}
{{- printf "%s/plugins/%s" (trimSuffix "/" .Values.kubeletDirectory) .Values.driverName -}}
{{- end -}}

{{- define "nvmesh-csi.stateDirectory" -}}
{{- .Values.node.stateDirectory | default (printf "%s/state" (include "nvmesh-csi.pluginDirectory" .)) -}}
{{- end -}}

{{- define "nvmesh-csi.startupTaintKey" -}}
{{- .Values.node.startupTaint.key | default (printf "%s/agent-not-ready" .Values.driverName) -}}
{{- end -}}

{{/* "true" where the node's pod talks to the API server. */}}
{{- define "nvmesh-csi.nodeUsesApi" -}}
{{- if or .Values.node.nodeLabel .Values.node.startupTaint.enabled .Values.node.preStop.enabled .Values.events.enabled .Values.csiAddons.enabled -}}true{{- end -}}
{{- end -}}

{{/* Host directories of the node's container, in addition to kubelet's and /dev, as a list of {path, mode} in
     YAML: `shared` ones show mounts of the container to the host, `read` ones are read-only. */}}
{{- define "nvmesh-csi.nodeDirectories" -}}
{{- $kubelet := .Values.kubeletDirectory -}}
{{- $devices := include "nvmesh-csi.deviceDirectory" . -}}
{{- if not (include "nvmesh-csi.isBelow" (list $devices "/dev")) }}
- {path: {{ $devices }}, mode: follow}
{{- end }}
{{- $status := include "nvmesh-csi.statusDirectory" . -}}
{{- if not (or (include "nvmesh-csi.isBelow" (list $status "/proc")) (include "nvmesh-csi.isBelow" (list $status "/dev"))) }}
- {path: {{ $status }}, mode: read}
{{- end }}
{{- $state := include "nvmesh-csi.stateDirectory" . -}}
{{- if not (include "nvmesh-csi.isBelow" (list $state $kubelet)) }}
- {path: {{ $state }}, mode: write}
{{- end }}
{{- range uniq .Values.node.extraPathRoots }}
{{- if not (include "nvmesh-csi.isBelow" (list . $kubelet)) }}
- {path: {{ . }}, mode: shared}
{{- end }}
{{- end }}
{{- if include "nvmesh-csi.isExported" . }}
- {path: /run/nvmesh-csi/nvme, mode: write}
- {path: /run/nvme/registry, mode: write}
{{- end }}
{{- if not .Values.storage.enabled }}
{{- range .Values.node.clientDirectories }}
- {path: {{ . }}, mode: read}
{{- end }}
{{- end }}
{{- end -}}

{{/* The affinity of a DaemonSet's pods: its value, and no node of an additional DaemonSet, as two of them on one node
     would serve one socket. Where two additional ones select a node, the first by name has it. */}}
{{- define "nvmesh-csi.nodeAffinity" -}}
{{- $own := .daemonSet -}}
{{- $others := list -}}
{{- range $name, $values := .Values.additionalDaemonSets -}}
{{- if or (not $own) (lt $name $own) -}}
{{- range $key, $value := $values.nodeSelector -}}
{{- $others = append $others (dict "key" $key "operator" "NotIn" "values" (list $value)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $affinity := deepCopy .Values.node.affinity -}}
{{- if $others -}}
{{- $terms := list -}}
{{- range dig "nodeAffinity" "requiredDuringSchedulingIgnoredDuringExecution" "nodeSelectorTerms" list $affinity -}}
{{- /* A term without a condition selects no node. */ -}}
{{- if or .matchExpressions .matchFields -}}
{{- $_ := set . "matchExpressions" (concat (.matchExpressions | default list) $others) -}}
{{- end -}}
{{- $terms = append $terms . -}}
{{- end -}}
{{- $terms = $terms | default (list (dict "matchExpressions" $others)) -}}
{{- $required := dict "nodeSelectorTerms" $terms -}}
{{- $affinity = mergeOverwrite $affinity (dict "nodeAffinity" (dict "requiredDuringSchedulingIgnoredDuringExecution" $required)) -}}
{{- end -}}
{{- with $affinity }}{{ toYaml . }}{{ end -}}
{{- end -}}
