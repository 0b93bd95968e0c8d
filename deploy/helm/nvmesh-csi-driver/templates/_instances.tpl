{{/* What several drivers in one cluster must not share follows the driver's name, where no value says otherwise. The
     driver that took over from the older ones keeps what they had. */}}

{{- define "nvmesh-csi.hasOlderName" -}}
{{- if eq .Values.driverName "nvmesh-csi.excelero.com" -}}true{{- end -}}
{{- end -}}

{{/* The topology key that the program is told; empty: it knows itself, or the description of the clusters says so. Two
     drivers must not share one: a node has one value for a key, and kubelet refuses the second driver if its zone has
     another name. */}}
{{- define "nvmesh-csi.topologyKey" -}}
{{- if .Values.topologyKey -}}{{- .Values.topologyKey -}}
{{- else if not (or (include "nvmesh-csi.hasOlderName" .) (has (include "nvmesh-csi.clusters" .) (list "secret" "configMap"))) -}}
{{- printf "%s/zone" .Values.driverName -}}
{{- end -}}
{{- end -}}

{{/* Directories of the embedded manager. Call with (dict "root" $ "of" "pool"|"device"|"status"). */}}
{{- define "nvmesh-csi.storageDirectory" -}}
{{- $given := index .root.Values.storage (printf "%sDirectory" .of) -}}
{{- if $given -}}{{- $given -}}
{{- else -}}
{{- $older := eq (include "nvmesh-csi.hasOlderName" .root) "true" -}}
{{- $name := ternary "nvmesh-csi" .root.Values.driverName $older -}}
{{- if eq .of "pool" -}}{{- printf "/var/lib/%s/pool" $name -}}
{{- else if eq .of "status" -}}{{- printf "/run/%s/proc" $name -}}
{{- else -}}{{- printf "/dev/%s" (ternary "nvmesh" $name $older) -}}
{{- end -}}
{{- end -}}
{{- end -}}
