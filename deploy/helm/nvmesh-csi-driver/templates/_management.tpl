{{/* Access to the storage management: arguments, files, checks. */}}

{{/* The description of several clusters: "zones", "secret", "configMap", or "" where there is one cluster. */}}
{{- define "nvmesh-csi.clusters" -}}
{{- if .Values.management.zones -}}zones
{{- else if .Values.management.existingClusters.secret -}}secret
{{- else if .Values.management.existingClusters.configMap -}}configMap
{{- end -}}
{{- end -}}

{{/* "true" where the embedded manager is the management. */}}
{{- define "nvmesh-csi.isEmbedded" -}}
{{- if and .Values.storage.enabled (not .Values.management.servers) (not (include "nvmesh-csi.clusters" .)) -}}true{{- end -}}
{{- end -}}

{{/* "true" where the embedded manager exports volumes to other nodes. */}}
{{- define "nvmesh-csi.isExported" -}}
{{- if and .Values.storage.enabled .Values.storage.nvme.enabled -}}true{{- end -}}
{{- end -}}

{{- define "nvmesh-csi.storageUrl" -}}
{{- $scheme := ternary "https" "http" (ne .Values.storage.tls.existingSecret "") -}}
{{- $host := .Values.storage.service.clusterIP -}}
{{- if contains ":" $host -}}{{- $host = printf "[%s]" $host -}}{{- end -}}
{{- $host = $host | default (printf "%s-storage.%s.svc" (include "nvmesh-csi.fullname" .) .Release.Namespace) -}}
{{- printf "%s://%s:%d" $scheme $host (int .Values.storage.service.port) -}}
{{- end -}}

{{/* Address of the manager's API; in the host's network the node's own, never all of them. */}}
{{- define "nvmesh-csi.storageListenHost" -}}
{{- ternary "$(HOST_IP)" .Values.storage.listenHost (and (eq (include "nvmesh-csi.isExported" .) "true") (eq .Values.storage.listenHost "0.0.0.0")) -}}
{{- end -}}

{{- define "nvmesh-csi.storageSecret" -}}
{{- .Values.storage.existingSecret | default (printf "%s-storage" (include "nvmesh-csi.fullname" .)) -}}
{{- end -}}

{{/* The Secret by which a node proves that it belongs to the cluster. */}}
{{- define "nvmesh-csi.joinSecret" -}}
{{- .Values.storage.nvme.authentication.existingSecret | default (printf "%s-nvme-join" (include "nvmesh-csi.fullname" .)) -}}
{{- end -}}

{{- define "nvmesh-csi.clustersPath" -}}
{{- if eq (include "nvmesh-csi.clusters" .) "zones" -}}
/etc/nvmesh-csi/clusters/clusters.yaml
{{- else -}}
{{- printf "/etc/nvmesh-csi/clusters/%s" .Values.management.existingClusters.key | trimSuffix "/" -}}
{{- end -}}
{{- end -}}

{{/* Arguments of who talks to the management. */}}
{{- define "nvmesh-csi.managementArgs" -}}
{{- $management := .Values.management -}}
{{- if include "nvmesh-csi.isEmbedded" . }}
- --management-server={{ include "nvmesh-csi.storageUrl" . }}
- {{ printf "--management-user=%s" .Values.storage.user | quote }}
- --management-password-file=/etc/nvmesh-csi/management/password
{{- if .Values.storage.tls.existingSecret }}
- --management-ca-file=/etc/nvmesh-csi/management-ca/ca.crt
{{- end }}
{{- else }}
{{- if include "nvmesh-csi.clusters" . }}
- --clusters-file={{ include "nvmesh-csi.clustersPath" . }}
{{- end }}
{{- range $management.servers }}
- {{ printf "--management-server=%s" . | quote }}
{{- end }}
{{- if $management.existingSecret }}
{{- if $management.user }}
- {{ printf "--management-user=%s" $management.user | quote }}
{{- else }}
- --management-user-file=/etc/nvmesh-csi/management/user
{{- end }}
- --management-password-file=/etc/nvmesh-csi/management/password
{{- end }}
{{- if $management.tls.caSecret }}
- --management-ca-file=/etc/nvmesh-csi/management-ca/ca.crt
{{- end }}
{{- if not $management.tls.verify }}
- --management-tls-verify=false
{{- end }}
{{- if $management.tls.clientCertificateSecret }}
- --management-client-certificate=/etc/nvmesh-csi/management-client/tls.crt
- --management-client-key=/etc/nvmesh-csi/management-client/tls.key
{{- end }}
{{- end }}
{{- end -}}

{{/* Secrets for the management, as a list of {name, path, secret, items} in YAML, for the mounts. */}}
{{- define "nvmesh-csi.managementSecrets" -}}
{{- $management := .Values.management -}}
{{- if include "nvmesh-csi.isEmbedded" . }}
- {name: management, secret: {{ include "nvmesh-csi.storageSecret" . | quote }}, items: [{key: {{ .Values.storage.passwordKey | quote }}, path: password}]}
{{- with .Values.storage.tls }}
{{- if .existingSecret }}
- {name: management-ca, secret: {{ .existingSecret | quote }}, items: [{key: {{ .caKey | quote }}, path: ca.crt}]}
{{- end }}
{{- end }}
{{- else }}
{{- include "nvmesh-csi.clusterSecrets" (dict "cluster" $management "name" "management" "defaults" $management) }}
{{- range $zone, $cluster := $management.zones }}
{{- include "nvmesh-csi.clusterSecrets" (dict "cluster" $cluster "name" (include "nvmesh-csi.zoneVolume" $zone) "defaults" $management) }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Secrets of one cluster. Call with (dict "cluster" VALUES "name" NAME "defaults" VALUES). */}}
{{- define "nvmesh-csi.clusterSecrets" -}}
{{- $cluster := .cluster -}}
{{- $tls := $cluster.tls | default dict -}}
{{- with $cluster.existingSecret }}
- name: {{ $.name }}
  secret: {{ . | quote }}
  items:
    - {key: {{ $cluster.passwordKey | default $.defaults.passwordKey | quote }}, path: password}
    {{- if not $cluster.user }}
    - {key: {{ $cluster.usernameKey | default $.defaults.usernameKey | quote }}, path: user}
    {{- end }}
{{- end }}
{{- with $tls.caSecret }}
- {name: {{ $.name }}-ca, secret: {{ . | quote }}, items: [{key: {{ $tls.caKey | default $.defaults.tls.caKey | quote }}, path: ca.crt}]}
{{- end }}
{{- with $tls.clientCertificateSecret }}
- {name: {{ $.name }}-client, secret: {{ . | quote }}, items: [{key: tls.crt, path: tls.crt}, {key: tls.key, path: tls.key}]}
{{- end }}
{{- end -}}

{{/* A zone's name may contain characters that a volume's may not. */}}
{{- define "nvmesh-csi.zoneVolume" -}}
{{- printf "zone-%s" (. | sha256sum | trunc 10) -}}
{{- end -}}

{{- define "nvmesh-csi.managementVolumes" -}}
{{- range (include "nvmesh-csi.managementSecrets" . | fromYamlArray) }}
- name: {{ .name }}
  secret:
    secretName: {{ .secret | quote }}
    defaultMode: 0440
    items: {{ toJson .items }}
{{- end }}
{{- include "nvmesh-csi.clustersVolume" . }}
{{- end -}}

{{- define "nvmesh-csi.managementMounts" -}}
{{- range (include "nvmesh-csi.managementSecrets" . | fromYamlArray) }}
- {name: {{ .name }}, mountPath: /etc/nvmesh-csi/{{ .name }}, readOnly: true}
{{- end }}
{{- include "nvmesh-csi.clustersMount" . }}
{{- end -}}

{{/* Mounted as a directory, never by subPath: only so does a change of it reach the container. */}}
{{- define "nvmesh-csi.clustersMount" -}}
{{- if include "nvmesh-csi.clusters" . }}
- {name: clusters, mountPath: /etc/nvmesh-csi/clusters, readOnly: true}
{{- end }}
{{- end -}}

{{- define "nvmesh-csi.clustersVolume" -}}
{{- $kind := include "nvmesh-csi.clusters" . -}}
{{- if eq $kind "zones" }}
- name: clusters
  configMap: {name: {{ include "nvmesh-csi.fullname" . }}-clusters}
{{- else if eq $kind "secret" }}
- name: clusters
  secret: {secretName: {{ .Values.management.existingClusters.secret | quote }}, defaultMode: 0440}
{{- else if eq $kind "configMap" }}
- name: clusters
  configMap: {name: {{ .Values.management.existingClusters.configMap | quote }}}
{{- end }}
{{- end -}}
