{{/*
Prefix of the default classes: "nvmesh-" for the older drivers' name, otherwise the driver name, so that several
drivers in one cluster do not collide.
*/}}
{{- define "nvmesh-csi.classPrefix" -}}
{{- with .Values.defaultStorageClasses.namePrefix }}{{ . }}
{{- else }}{{ ternary "nvmesh" .Values.driverName (eq (include "nvmesh-csi.hasOlderName" .) "true") }}-{{ end -}}
{{- end }}

{{/*
The parameters of a class (dict class) as YAML: those of the values, the filesystem, and the Secrets of encryption.
*/}}
{{- define "nvmesh-csi.classParameters" -}}
{{- $class := .class }}
{{- $parameters := dict }}
{{- range $key, $value := $class.parameters }}{{ $_ := set $parameters $key (include "nvmesh-csi.word" $value) }}{{ end }}
{{- $own := dict }}
{{- with $class.fsType }}{{ $_ := set $own "csi.storage.k8s.io/fstype" . }}{{ end }}
{{- $secrets := dict }}
{{- with $class.encryptionSecret }}
{{- $secrets = dict "provisioner" . "nodeStage" . "nodeExpand" . }}
{{- end }}
{{- range $use, $secret := merge (dict) ($class.secrets | default dict) $secrets }}
{{- $_ := set $own (printf "csi.storage.k8s.io/%s-secret-name" (kebabcase $use)) $secret.name }}
{{- $_ := set $own (printf "csi.storage.k8s.io/%s-secret-namespace" (kebabcase $use)) $secret.namespace }}
{{- end }}
{{- range $key, $value := $own }}
{{- if hasKey $parameters $key }}
{{- fail (printf "storageClasses: class %s sets %s twice: in its parameters and by fsType, secrets or encryptionSecret; remove one" $class.name $key) }}
{{- end }}
{{- $_ := set $parameters $key $value }}
{{- end }}
{{- with $parameters }}{{ toYaml . }}{{ end -}}
{{- end }}

{{/*
One StorageClass (dict root, class).
*/}}
{{- define "nvmesh-csi.storageClass" -}}
{{- $class := .class }}
{{- $annotations := $class.annotations | default dict }}
{{- if $class.isDefault }}
{{- $annotations = merge (dict "storageclass.kubernetes.io/is-default-class" "true") $annotations }}
{{- end }}
---
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata:
  name: {{ $class.name | quote }}
  labels: {{- mergeOverwrite (include "nvmesh-csi.labels" (dict "root" .root "component" "") | fromYaml) ($class.labels | default dict | deepCopy) | toYaml | nindent 4 }}
  {{- with $annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
provisioner: {{ .root.Values.driverName }}
reclaimPolicy: {{ $class.reclaimPolicy | default "Delete" }}
volumeBindingMode: {{ $class.volumeBindingMode | default "WaitForFirstConsumer" }}
allowVolumeExpansion: {{ hasKey $class "allowVolumeExpansion" | ternary $class.allowVolumeExpansion true }}
{{- with $class.mountOptions }}
mountOptions:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with include "nvmesh-csi.classParameters" . }}
parameters:
  {{- . | nindent 2 }}
{{- end }}
{{- with $class.allowedTopologies }}
allowedTopologies:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{ end }}

{{/*
One of the default classes (dict root, class), as it is or, where the cluster has a class of its name:
one of this release keeps its immutable fields; any other is unchanged.
*/}}
{{- define "nvmesh-csi.defaultClass" -}}
{{- $class := .class }}
{{- $there := lookup "storage.k8s.io/v1" "StorageClass" "" $class.name }}
{{- if not $there }}
{{- include "nvmesh-csi.storageClass" . }}
{{- else if ne $there.provisioner .root.Values.driverName }}
{{- fail (printf "StorageClass %s exists and is of the driver %s, not %s: set defaultStorageClasses.namePrefix, or defaultStorageClasses.enabled=false" $class.name $there.provisioner .root.Values.driverName) }}
{{- else if include "nvmesh-csi.isOfThisRelease" (dict "root" .root "object" $there) }}
{{- $kept := pick $there "parameters" "reclaimPolicy" "volumeBindingMode" }}
{{- include "nvmesh-csi.storageClass" (dict "root" .root "class" (merge (dict) $kept (omit $class "parameters" "reclaimPolicy" "volumeBindingMode"))) }}
{{- end }}
{{- end }}

{{/*
Whether an object of the cluster (dict root, object) belongs to this release; empty = it does not.
*/}}
{{- define "nvmesh-csi.isOfThisRelease" -}}
{{- $annotations := .object.metadata.annotations | default dict }}
{{- if and (eq (index $annotations "meta.helm.sh/release-name" | default "") .root.Release.Name) (eq (index $annotations "meta.helm.sh/release-namespace" | default "") .root.Release.Namespace) }}true{{ end -}}
{{- end }}

{{/* Refuse parameters that the driver does not know. Call with (dict "place" PATH "classes" LIST "known" NAMES): an
     unknown one would be refused when the first volume is created. */}}
{{- define "nvmesh-csi.validateParameters" -}}
{{- $known := splitList " " .known -}}
{{- range $class := .classes -}}
{{- range $key, $_ := $class.parameters -}}
{{- if not (or (has $key $known) (hasPrefix "csi.storage.k8s.io/" $key) (regexMatch "^encryption\\.[A-Za-z]+$" $key)) -}}
{{- $nearest := "" -}}
{{- $least := 4 -}}
{{- range $known -}}
{{- $distance := include "nvmesh-csi.distance" (list (lower $key) (lower .)) | int -}}
{{- $letters := splitList "" (lower .) | sortAlpha | join "" -}}
{{- if eq $letters (splitList "" (lower $key) | sortAlpha | join "") -}}{{- $distance = 1 -}}{{- end -}}
{{- if lt $distance $least -}}{{- $nearest = . -}}{{- $least = $distance -}}{{- end -}}
{{- end -}}
{{- fail (printf "%s: class %s has the parameter %s, which the driver does not know; %s" $.place $class.name $key (ternary "docs/parameters.md lists them" (printf "did you mean %s?" $nearest) (empty $nearest))) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Number of letters to add, remove or change between two words (Levenshtein). Call with (list WORD WORD). */}}
{{- define "nvmesh-csi.distance" -}}
{{- $second := last . | splitList "" -}}
{{- $row := until (len $second | add1 | int) -}}
{{- range $i, $one := first . | splitList "" -}}
{{- $next := list (add1 $i) -}}
{{- range $j, $other := $second -}}
{{- $changed := add (index $row $j) (ternary 0 1 (eq $one $other)) -}}
{{- $next = append $next (min $changed (add1 (index $row (add1 $j))) (add1 (index $next $j))) -}}
{{- end -}}
{{- $row = $next -}}
{{- end -}}
{{- last $row -}}
{{- end -}}
