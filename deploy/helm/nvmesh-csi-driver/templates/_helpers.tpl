{{/* Names, labels, images: what every object of the chart has. */}}

{{/* Start of every name: at most 40 characters, as the longest of our suffixes and what Kubernetes adds to the names
     of pods and revisions (a StatefulSet's revision is a label of 63 characters) follow it. A longer one is cut
     and gets a hash, so that two long names that begin alike stay two. */}}
{{- define "nvmesh-csi.fullname" -}}
{{- $name := .Values.fullnameOverride | default .Release.Name -}}
{{- $own := .Values.nameOverride | default "nvmesh-csi" -}}
{{- if not (or .Values.fullnameOverride (contains $own .Release.Name)) -}}
{{- $name = printf "%s-%s" .Release.Name $own -}}
{{- end -}}
{{- if gt (len $name) 40 -}}
{{- printf "%s-%s" ($name | trunc 31 | trimSuffix "-" | trimSuffix ".") ($name | sha256sum | trunc 8) -}}
{{- else -}}
{{- $name -}}
{{- end -}}
{{- end -}}

{{/* Labels of an object. Call with (dict "root" $ "component" NAME "labels" ITS OWN); NAME may be empty. */}}
{{- define "nvmesh-csi.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "nvmesh-csi.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: nvmesh-csi
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- with merge (dict) (.labels | default dict) .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Labels of a role's pods: not the chart's version, so that a release of the chart alone restarts no pod. Call with
     (dict "root" $ "component" NAME). */}}
{{- define "nvmesh-csi.podLabels" -}}
{{ include "nvmesh-csi.selector" . }}
app.kubernetes.io/part-of: nvmesh-csi
{{- with merge (dict) (index .root.Values .component).podLabels .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Labels that tell a role's pods; a workload's selector cannot be changed, so these never do. */}}
{{- define "nvmesh-csi.selector" -}}
app.kubernetes.io/name: {{ .root.Values.nameOverride | default .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- with .root.daemonSet }}
nvmesh-csi/daemonset: {{ . | quote }}
{{- end }}
{{- end -}}

{{/* An image. Call with (dict "root" $ "image" VALUES). */}}
{{- define "nvmesh-csi.image" -}}
{{- $repository := .image.repository -}}
{{- with .root.Values.global.imageRegistry -}}
{{- $parts := splitList "/" $repository -}}
{{- $host := first $parts -}}
{{- if and (gt (len $parts) 1) (or (contains "." $host) (contains ":" $host) (eq $host "localhost")) -}}
{{- $repository = join "/" (rest $parts) -}}
{{- end -}}
{{- $repository = printf "%s/%s" (trimSuffix "/" .) $repository -}}
{{- end -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $repository .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository (.image.tag | default .root.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{- define "nvmesh-csi.pullSecrets" -}}
{{- with .Values.global.imagePullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* The service account of a role. Call with (dict "root" $ "role" NAME). */}}
{{- define "nvmesh-csi.serviceAccount" -}}
{{- $account := (index .root.Values .role).serviceAccount -}}
{{- $account.name | default (ternary (printf "%s-%s" (include "nvmesh-csi.fullname" .root) .role) "default" $account.create) -}}
{{- end -}}

{{/* Return whether one path is another, or lies below it: "true" or "". Call with (list PATH DIRECTORY). */}}
{{- define "nvmesh-csi.isBelow" -}}
{{- if hasPrefix (printf "%s/" (trimSuffix "/" (last .))) (printf "%s/" (trimSuffix "/" (first .))) -}}true{{- end -}}
{{- end -}}

{{/* Name of a volume for a path of the host. */}}
{{- define "nvmesh-csi.hostVolume" -}}
{{- printf "host-%s" (. | sha256sum | trunc 10) -}}
{{- end -}}
