{{- define "nvmesh-csi.scc" -}}
{{- $volumes := .volumes -}}
{{- range prepend (ternary (values .root.Values.additionalDaemonSets) list (eq .component "node")) (index .root.Values .component) -}}
{{- range .extraVolumes -}}{{- $volumes = concat $volumes (keys (omit . "name")) -}}{{- end -}}
{{- end -}}
---
apiVersion: security.openshift.io/v1
kind: SecurityContextConstraints
metadata:
  name: {{ .name }}
  labels:
    {{- include "nvmesh-csi.labels" (dict "root" .root "component" .component) | nindent 4 }}
  annotations:
    kubernetes.io/description: {{ .description | quote }}
# Mounts and block devices are made in the host's mount namespace: this takes CAP_SYS_ADMIN and every device.
allowPrivilegedContainer: true
allowPrivilegeEscalation: true
allowHostDirVolumePlugin: true
allowHostNetwork: {{ .hostNetwork }}
allowHostPorts: {{ .hostNetwork }}
allowHostPID: false
allowHostIPC: false
allowedCapabilities: []
defaultAddCapabilities: []
requiredDropCapabilities: []
readOnlyRootFilesystem: true
runAsUser:
  type: MustRunAs
  uid: 0
seLinuxContext:
  type: RunAsAny
fsGroup:
  type: RunAsAny
supplementalGroups:
  type: RunAsAny
seccompProfiles: [runtime/default]
volumes: [{{ $volumes | uniq | sortAlpha | join ", " }}]
# Empty: the RoleBinding below grants the use.
users: []
groups: []
priority: null
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  name: {{ .name }}-scc
  namespace: {{ .root.Release.Namespace | quote }}
  labels:
    {{- include "nvmesh-csi.labels" (dict "root" .root "component" .component) | nindent 4 }}
rules:
  - apiGroups: [security.openshift.io]
    resources: [securitycontextconstraints]
    resourceNames: [{{ .name }}]
    verbs: [use]
---
{{- include "nvmesh-csi.sccBinding" (dict "root" .root "component" .component "kind" "Role" "role" (printf "%s-scc" .name)) }}
{{ end }}

{{- define "nvmesh-csi.sccBinding" }}
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: {{ include "nvmesh-csi.fullname" .root }}-{{ .component }}-scc
  namespace: {{ .root.Release.Namespace | quote }}
  labels:
    {{- include "nvmesh-csi.labels" (dict "root" .root "component" .component) | nindent 4 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: {{ .kind }}
  name: {{ .role }}
subjects:
  - kind: ServiceAccount
    name: {{ include "nvmesh-csi.serviceAccount" (dict "root" .root "role" .component) | quote }}
    namespace: {{ .root.Release.Namespace | quote }}
{{- end }}
