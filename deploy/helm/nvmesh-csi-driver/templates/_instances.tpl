{{/* What several drivers in one cluster must not share follows the driver's name, where no value says otherwise. The
     driver that replaced the older ones keeps their names. */}}

{{- define "nvmesh-csi.hasOlderName" -}}
{{- if eq .Values.driverName "nvmesh-csi.excelero.com" -}}true{{- end -}}
{{- end -}}

{{/* The topology key as a flag; empty: the default, or the key of the clusters file. Two
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
