{{/* A ClusterRole with its binding. Call with (dict "root" $ "name" NAME "role" ACCOUNT'S ROLE "rules" YAML). */}}
{{- define "nvmesh-csi.clusterRole" -}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: {{ include "nvmesh-csi.fullname" .root }}-{{ .name }}
  labels: {{- include "nvmesh-csi.labels" (dict "root" .root "component" .role) | nindent 4 }}
rules: {{- .rules | nindent 2 }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: {{ include "nvmesh-csi.fullname" .root }}-{{ .name }}
  labels: {{- include "nvmesh-csi.labels" (dict "root" .root "component" .role) | nindent 4 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: {{ include "nvmesh-csi.fullname" .root }}-{{ .name }}
subjects:
  - kind: ServiceAccount
    name: {{ include "nvmesh-csi.serviceAccount" (dict "root" .root "role" .role) | quote }}
    namespace: {{ .root.Release.Namespace | quote }}
{{- end -}}

{{/* A Role with its binding, in the release's namespace or another. Call as above, with "namespace". */}}
{{- define "nvmesh-csi.role" -}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  name: {{ include "nvmesh-csi.fullname" .root }}-{{ .name }}
  namespace: {{ .namespace | default .root.Release.Namespace | quote }}
  labels: {{- include "nvmesh-csi.labels" (dict "root" .root "component" .role) | nindent 4 }}
rules: {{- .rules | nindent 2 }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: {{ include "nvmesh-csi.fullname" .root }}-{{ .name }}
  namespace: {{ .namespace | default .root.Release.Namespace | quote }}
  labels: {{- include "nvmesh-csi.labels" (dict "root" .root "component" .role) | nindent 4 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: {{ include "nvmesh-csi.fullname" .root }}-{{ .name }}
subjects:
  - kind: ServiceAccount
    name: {{ include "nvmesh-csi.serviceAccount" (dict "root" .root "role" .role) | quote }}
    namespace: {{ .root.Release.Namespace | quote }}
{{- end -}}

{{/* Leader election, and events of the lease. */}}
{{- define "nvmesh-csi.leaseRules" -}}
- {apiGroups: [coordination.k8s.io], resources: [leases], verbs: [get, create, update]}
- {apiGroups: [""], resources: [events], verbs: [create, patch]}
{{- end -}}

{{- define "nvmesh-csi.provisionerRules" -}}
- {apiGroups: [""], resources: [persistentvolumes], verbs: [get, list, watch, create, patch, delete]}
- {apiGroups: [""], resources: [persistentvolumeclaims], verbs: [get, list, watch, update]}
- {apiGroups: [""], resources: [nodes], verbs: [get, list, watch]}
- {apiGroups: [""], resources: [events], verbs: [create, patch]}
- {apiGroups: [storage.k8s.io], resources: [storageclasses, csinodes, volumeattributesclasses], verbs: [get, list, watch]}
# A volume is deleted when it is detached everywhere, not before.
- {apiGroups: [storage.k8s.io], resources: [volumeattachments], verbs: [get, list, watch]}
{{- if .Values.snapshots.enabled }}
# A snapshot is kept while a volume is made of it.
- {apiGroups: [snapshot.storage.k8s.io], resources: [volumesnapshots], verbs: [get, list, watch, update]}
- {apiGroups: [snapshot.storage.k8s.io], resources: [volumesnapshotcontents], verbs: [get]}
{{- end -}}
{{- end -}}

{{- define "nvmesh-csi.provisionerNamespacedRules" -}}
{{ include "nvmesh-csi.leaseRules" . }}
{{- if .Values.sidecars.provisioner.capacity.enabled }}
- {apiGroups: [storage.k8s.io], resources: [csistoragecapacities], verbs: [get, list, watch, create, update, patch, delete]}
# From the pod up to the Deployment, which owns the capacity objects.
- {apiGroups: [""], resources: [pods], verbs: [get]}
- {apiGroups: [apps], resources: [replicasets], verbs: [get]}
{{- end -}}
{{- end -}}

{{- define "nvmesh-csi.attacherRules" -}}
- {apiGroups: [""], resources: [persistentvolumes], verbs: [get, list, watch, patch]}
- {apiGroups: [storage.k8s.io], resources: [csinodes], verbs: [get, list, watch]}
- {apiGroups: [storage.k8s.io], resources: [volumeattachments], verbs: [get, list, watch, patch]}
- {apiGroups: [storage.k8s.io], resources: [volumeattachments/status], verbs: [patch]}
{{- end -}}

{{- define "nvmesh-csi.resizerRules" -}}
- {apiGroups: [""], resources: [persistentvolumes], verbs: [get, list, watch, patch]}
- {apiGroups: [""], resources: [persistentvolumeclaims], verbs: [get, list, watch]}
- {apiGroups: [""], resources: [persistentvolumeclaims/status], verbs: [patch]}
- {apiGroups: [""], resources: [events], verbs: [create, patch]}
- {apiGroups: [storage.k8s.io], resources: [volumeattributesclasses], verbs: [get, list, watch]}
{{- end -}}

{{- define "nvmesh-csi.snapshotterRules" -}}
- {apiGroups: [snapshot.storage.k8s.io], resources: [volumesnapshotclasses], verbs: [get, list, watch]}
- {apiGroups: [snapshot.storage.k8s.io], resources: [volumesnapshotcontents], verbs: [get, list, watch, patch]}
- {apiGroups: [snapshot.storage.k8s.io], resources: [volumesnapshotcontents/status], verbs: [update, patch]}
- {apiGroups: [groupsnapshot.storage.k8s.io], resources: [volumegroupsnapshotclasses], verbs: [get, list, watch]}
- {apiGroups: [groupsnapshot.storage.k8s.io], resources: [volumegroupsnapshotcontents], verbs: [get, list, watch, patch]}
- {apiGroups: [groupsnapshot.storage.k8s.io], resources: [volumegroupsnapshotcontents/status], verbs: [update, patch]}
- {apiGroups: [""], resources: [events], verbs: [create, patch]}
{{- end -}}

{{/* Events, and the objects that they are about where the driver does not know them: its own CSIDriver object; of a
     node a VolumeAttachment by its name, which has the claim. */}}
{{- define "nvmesh-csi.eventRules" -}}
- {apiGroups: [events.k8s.io], resources: [events], verbs: [create, patch]}
{{- end -}}

{{- define "nvmesh-csi.controllerEventRules" -}}
{{ include "nvmesh-csi.eventRules" . }}
- {apiGroups: [storage.k8s.io], resources: [csidrivers], resourceNames: [{{ .Values.driverName | quote }}], verbs: [get]}
{{- end -}}

{{/* The sidecar of CSI-Addons: volumes by name, and the tokens of its controller. */}}
{{- define "nvmesh-csi.addonsRules" -}}
- {apiGroups: [""], resources: [persistentvolumes], verbs: [get]}
- {apiGroups: [authentication.k8s.io], resources: [tokenreviews], verbs: [create]}
{{- end -}}

{{/* Its object of each pod, which belongs to the pod or its DaemonSet; OpenShift asks for the right to block the owner. */}}
{{- define "nvmesh-csi.addonsNamespacedRules" -}}
- {apiGroups: [csiaddons.openshift.io], resources: [csiaddonsnodes], verbs: [get, watch, create, update]}
- {apiGroups: [""], resources: [pods], verbs: [get]}
{{- if eq .role "controller" }}
- {apiGroups: [apps], resources: [replicasets], verbs: [get]}
{{ include "nvmesh-csi.leaseRules" . }}
{{- else }}
- {apiGroups: [apps], resources: [daemonsets/finalizers], verbs: [update]}
{{- end -}}
{{- end -}}

{{- define "nvmesh-csi.nodeRules" -}}
{{- $node := .Values.node -}}
{{- $rules := list -}}
{{- $verbs := list -}}
{{- if or $node.startupTaint.enabled $node.preStop.enabled -}}{{- $verbs = append $verbs "get" -}}{{- end -}}
{{- if or $node.startupTaint.enabled $node.nodeLabel -}}{{- $verbs = append $verbs "patch" -}}{{- end -}}
{{- if $verbs -}}
{{- $rules = append $rules (printf "- {apiGroups: [\"\"], resources: [nodes], verbs: %s}" (toJson $verbs)) -}}
{{- end -}}
{{- if $node.startupTaint.enabled -}}
{{- $rules = append $rules "- {apiGroups: [storage.k8s.io], resources: [csinodes], verbs: [get]}" -}}
{{- end -}}
{{- if or $node.preStop.enabled .Values.events.enabled -}}
{{- $rules = append $rules "- {apiGroups: [storage.k8s.io], resources: [volumeattachments], verbs: [get]}" -}}
{{- end -}}
{{- if .Values.events.enabled -}}
{{- $rules = append $rules (include "nvmesh-csi.eventRules" .) -}}
{{- end -}}
{{- join "\n" $rules -}}
{{- end -}}
