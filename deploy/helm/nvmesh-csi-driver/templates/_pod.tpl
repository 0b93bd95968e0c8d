{{/* Parts that the workloads of controller, node and storage share. Call each with (dict "root" $ "role" NAME). */}}

{{/* Name of a role's workload; of an additional DaemonSet with its own name. */}}
{{- define "nvmesh-csi.workloadName" -}}
{{- compact (list (include "nvmesh-csi.fullname" .root) .role (.root.daemonSet | default "")) | join "-" -}}
{{- end -}}

{{- define "nvmesh-csi.workloadMetadata" -}}
{{- $values := index .root.Values .role -}}
name: {{ include "nvmesh-csi.workloadName" . }}
namespace: {{ .root.Release.Namespace | quote }}
labels: {{- include "nvmesh-csi.labels" (dict "root" .root "component" .role "labels" $values.labels) | nindent 2 }}
{{- with $values.annotations }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "nvmesh-csi.podMetadata" -}}
labels: {{- include "nvmesh-csi.podLabels" (dict "root" .root "component" .role) | nindent 2 }}
{{- $annotations := ternary dict (dict "kubectl.kubernetes.io/default-container" "driver") (eq .role "storage") }}
{{- with merge (dict) (index .root.Values .role).podAnnotations $annotations }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* "true" where the pod uses the host's network: listeners and connections of NVMe/TCP belong to the network namespace
     in which they are made, and a connection that was made in a pod's is never made again. */}}
{{- define "nvmesh-csi.hostNetwork" -}}
{{- if or (index .root.Values .role).hostNetwork (and (ne .role "controller") (include "nvmesh-csi.isExported" .root)) -}}true{{- end -}}
{{- end -}}

{{/* A pod without its affinity, containers and volumes. */}}
{{- define "nvmesh-csi.podSpec" -}}
{{- $values := index .root.Values .role -}}
{{- include "nvmesh-csi.pullSecrets" .root }}
# Their variables begin as the program's own do.
enableServiceLinks: false
serviceAccountName: {{ include "nvmesh-csi.serviceAccount" . | quote }}
priorityClassName: {{ $values.priorityClassName | quote }}
{{- $preStop := $values.preStop | default dict }}
{{- /* preStop and the driver's own end share the pod's time. */}}
terminationGracePeriodSeconds: {{ add (int $values.terminationGracePeriodSeconds) (ternary (int $preStop.timeoutSeconds) 0 ($preStop.enabled | default false)) }}
{{- $hostNetwork := include "nvmesh-csi.hostNetwork" . }}
{{- if $hostNetwork }}
hostNetwork: true
{{- end }}
{{- with $values.dnsPolicy | default (ternary "ClusterFirstWithHostNet" "" (eq $hostNetwork "true")) }}
dnsPolicy: {{ . }}
{{- end }}
{{- with $values.dnsConfig }}
dnsConfig: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.hostAliases }}
hostAliases: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
securityContext: {{- mergeOverwrite (include (ternary "nvmesh-csi.unprivilegedPod" "nvmesh-csi.privilegedPod" (eq .role "controller")) . | fromYaml) ($values.podSecurityContext | default dict | deepCopy) | toYaml | nindent 2 }}
{{- with $values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.initContainers }}
initContainers: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* The driver's container without its name, arguments, ports and mounts. Call with "sidecarPort", too. */}}
{{- define "nvmesh-csi.driverContainer" -}}
{{- $values := index .root.Values .role -}}
{{- $isPrivileged := ne .role "controller" -}}
image: {{ include "nvmesh-csi.image" (dict "root" .root "image" .root.Values.image) }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
{{- if or $isPrivileged $values.extraEnv }}
env:
  {{- if $isPrivileged }}
  - name: NODE_NAME
    valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
  {{- if and (eq .role "storage") (include "nvmesh-csi.isExported" .root) }}
  - name: HOST_IP
    valueFrom: {fieldRef: {fieldPath: status.hostIP}}
  {{- end }}
  {{- end }}
  {{- with $values.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- with $values.envFrom }}
envFrom: {{- toYaml . | nindent 2 }}
{{- end }}
{{- include "nvmesh-csi.probes" . }}
resources: {{- toYaml $values.resources | nindent 2 }}
securityContext: {{- mergeOverwrite (include (ternary "nvmesh-csi.privileged" "nvmesh-csi.unprivileged" $isPrivileged) . | fromYaml) ($values.securityContext | default dict | deepCopy) | toYaml | nindent 2 }}
{{- if $isPrivileged }}
# The usual place lies in /dev, which is the host's here.
terminationMessagePath: /tmp/termination-log
{{- end }}
terminationMessagePolicy: FallbackToLogsOnError
{{- end -}}

{{/* Mounts and volumes of every privileged pod. */}}
{{- define "nvmesh-csi.privilegedMounts" -}}
- {name: dev, mountPath: /dev}
- {name: tmp, mountPath: /tmp}
- {name: cryptsetup, mountPath: /run/cryptsetup}
{{- if include "nvmesh-csi.isExported" . }}
# To load the kernel's modules of NVMe/TCP.
- {name: modules, mountPath: /lib/modules, readOnly: true}
{{- if .Values.storage.nvme.authentication.enabled }}
- {name: join, mountPath: /etc/nvmesh-csi/join, readOnly: true}
{{- end }}
{{- end }}
{{- end -}}

{{- define "nvmesh-csi.privilegedVolumes" -}}
- name: dev
  hostPath: {path: /dev, type: Directory}
- name: tmp
  emptyDir: {medium: Memory, sizeLimit: 64Mi}
# Locks of cryptsetup.
- name: cryptsetup
  emptyDir: {medium: Memory, sizeLimit: 16Mi}
{{- if include "nvmesh-csi.isExported" . }}
- name: modules
  hostPath: {path: /lib/modules}
{{- with .Values.storage.nvme.authentication }}
{{- if .enabled }}
- name: join
  secret:
    secretName: {{ include "nvmesh-csi.joinSecret" $ | quote }}
    defaultMode: 0400
    items: [{key: {{ .tokenKey | quote }}, path: token}]
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* What no container of ours needs, where it is not the node's or the storage manager's. */}}
{{- define "nvmesh-csi.unprivileged" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* Secrets and the CSI socket are for this group alone. */}}
{{- define "nvmesh-csi.unprivilegedPod" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* Mounts that pods see (Bidirectional), loop and mapped devices: Kubernetes gives them to privileged containers
     alone. */}}
{{- define "nvmesh-csi.privileged" -}}
privileged: true
runAsNonRoot: false
runAsUser: 0
runAsGroup: 0
readOnlyRootFilesystem: true
{{- end -}}

{{- define "nvmesh-csi.privilegedPod" -}}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* How a workload is updated: of another way than RollingUpdate Kubernetes takes no terms of it. */}}
{{- define "nvmesh-csi.updateStrategy" -}}
type: {{ .type }}
{{- if and (eq .type "RollingUpdate") .rollingUpdate }}
rollingUpdate: {{- toYaml .rollingUpdate | nindent 2 }}
{{- end }}
{{- end -}}
