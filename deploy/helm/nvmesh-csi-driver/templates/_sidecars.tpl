{{/* The sidecars' containers. */}}

{{/* Names of the sidecars in a controller pod that talk to the API server, separated by blanks. */}}
{{- define "nvmesh-csi.controllerSidecars" -}}
provisioner{{ if eq .Values.attachBy "controller" }} attacher{{ end }} resizer{{ if .Values.snapshots.enabled }} snapshotter{{ end }}
{{- end -}}

{{/* Arguments of every sidecar that talks to the API server. Call with (dict "root" $ "sidecar" VALUES). */}}
{{- define "nvmesh-csi.sidecarArgs" -}}
{{- $all := .root.Values.sidecars -}}
- --csi-address=/run/csi/csi.sock
- --leader-election
- --leader-election-namespace=$(NAMESPACE)
- --leader-election-lease-duration={{ int $all.leaderElection.leaseDurationSeconds }}s
- --leader-election-renew-deadline={{ int $all.leaderElection.renewDeadlineSeconds }}s
- --leader-election-retry-period={{ int $all.leaderElection.retryPeriodSeconds }}s
- --kube-api-qps={{ $all.kubeApiQps }}
- --kube-api-burst={{ int $all.kubeApiBurst }}
- --retry-interval-start={{ int .sidecar.retryIntervalStartSeconds }}s
- --retry-interval-max={{ int .sidecar.retryIntervalMaxSeconds }}s
{{- with .sidecar.httpPort }}
- --http-endpoint={{ include "nvmesh-csi.sidecarHost" $ }}:{{ int . }}
{{- end }}
{{- end -}}

{{/* Address of the sidecars' HTTP servers: every one of a pod; on the host's network that of the driver. */}}
{{- define "nvmesh-csi.sidecarHost" -}}
{{- if .root.Values.controller.hostNetwork }}{{ include "nvmesh-csi.httpHost" (dict "root" .root "role" "controller") }}{{ end -}}
{{- end -}}

{{/* Last arguments of every sidecar. Call with (dict "root" $ "name" NAME). */}}
{{- define "nvmesh-csi.sidecarLastArgs" -}}
- --v={{ int .root.Values.sidecars.logVerbosity }}
{{- if eq .root.Values.logFormat "json" }}
- --logging-format=json
{{- end }}
{{- range (index .root.Values.sidecars .name).extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end -}}

{{/* A sidecar without its name, arguments and mounts. Call with (dict "root" $ "name" NAME "asRoot" BOOL): on the node
     it is root without any capability, as the sockets are root's. */}}
{{- define "nvmesh-csi.sidecarContainer" -}}
{{- $all := .root.Values.sidecars -}}
{{- $sidecar := index $all .name -}}
{{- $own := include "nvmesh-csi.unprivileged" . | fromYaml -}}
{{- if .asRoot -}}{{- $own = merge $own (dict "runAsNonRoot" false "runAsUser" 0 "runAsGroup" 0) -}}{{- end -}}
image: {{ include "nvmesh-csi.image" (dict "root" .root "image" $sidecar.image) }}
imagePullPolicy: {{ $sidecar.image.pullPolicy }}
resources: {{- $sidecar.resources | default $all.resources | toYaml | nindent 2 }}
securityContext: {{- mergeOverwrite $own ($all.securityContext | default dict | deepCopy) | toYaml | nindent 2 }}
{{- end -}}

{{- define "nvmesh-csi.sidecarEnv" -}}
- name: NAMESPACE
  valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
{{- end -}}

{{/* A sidecar of the controller. Call with (dict "root" $ "name" NAME "args" TEXT). */}}
{{- define "nvmesh-csi.controllerSidecar" -}}
{{- $sidecar := index .root.Values.sidecars .name -}}
{{- $host := include "nvmesh-csi.sidecarHost" . -}}
{{- $host = ternary (printf ", host: %s" $host) "" (hasPrefix "127." $host) -}}
- name: {{ .name }}
  {{- include "nvmesh-csi.sidecarContainer" (dict "root" .root "name" .name) | nindent 2 }}
  args:
    {{- include "nvmesh-csi.sidecarArgs" (dict "root" .root "sidecar" $sidecar) | nindent 4 }}
    {{- .args | nindent 4 }}
    {{- include "nvmesh-csi.sidecarLastArgs" . | nindent 4 }}
  env: {{- include "nvmesh-csi.sidecarEnv" .root | nindent 4 }}
  {{- if $sidecar.httpPort }}
  ports:
    - {name: {{ .name }}, containerPort: {{ int $sidecar.httpPort }}}
  # It listens when the driver is ready, which takes as long as the management is away: to be killed meanwhile would have
  # it wait in ever longer pauses after that. It is restarted after a day.
  startupProbe:
    httpGet: {path: /healthz/leader-election, port: {{ .name }}{{ $host }}}
    periodSeconds: 5
    timeoutSeconds: 5
    failureThreshold: 17280
  # Restart a leader that cannot renew its lease and does not stop.
  livenessProbe:
    httpGet: {path: /healthz/leader-election, port: {{ .name }}{{ $host }}}
    periodSeconds: 20
    timeoutSeconds: 10
    failureThreshold: 3
  {{- end }}
  volumeMounts:
    - {name: socket, mountPath: /run/csi}
{{- end -}}

{{/* livenessprobe in a pod. Call with (dict "root" $ "role" NAME "port" PORT "mount" VOLUME "asRoot" BOOL). */}}
{{- define "nvmesh-csi.livenessSidecar" -}}
- name: livenessprobe
  {{- include "nvmesh-csi.sidecarContainer" (dict "root" .root "name" "livenessprobe" "asRoot" .asRoot) | nindent 2 }}
  args:
    - --csi-address=/run/csi/csi.sock
    - --probe-timeout={{ int .root.Values.sidecars.livenessprobe.probeTimeoutSeconds }}s
    - --http-endpoint={{ ternary "127.0.0.1" "" (eq (include "nvmesh-csi.hostNetwork" .) "true") }}:{{ int .port }}
    {{- include "nvmesh-csi.sidecarLastArgs" (dict "root" .root "name" "livenessprobe") | nindent 4 }}
  volumeMounts:
    - {name: {{ .mount }}, mountPath: /run/csi}
{{- end -}}

{{/* The sidecar of CSI-Addons in a pod. Call with (dict "root" $ "role" NAME "port" PORT "asRoot" BOOL). */}}
{{- define "nvmesh-csi.addonsSidecar" -}}
{{- $all := .root.Values.sidecars -}}
- name: csi-addons
  {{- include "nvmesh-csi.sidecarContainer" (dict "root" .root "name" "csiAddons" "asRoot" .asRoot) | nindent 2 }}
  args:
    - --csi-addons-address=unix:///run/csi-addons/csi-addons.sock
    - --controller-port={{ int .port }}
    - --node-id=$(NODE_NAME)
    - --pod=$(POD_NAME)
    - --namespace=$(NAMESPACE)
    - --pod-uid=$(POD_UID)
    - --stagingpath={{ trimSuffix "/" .root.Values.kubeletDirectory }}/plugins/kubernetes.io/csi
    - --timeout={{ int $all.csiAddons.timeoutSeconds }}s
    {{- if eq .role "controller" }}
    - --leader-election-namespace=$(NAMESPACE)
    - --leader-election-lease-duration={{ int $all.leaderElection.leaseDurationSeconds }}s
    - --leader-election-renew-deadline={{ int $all.leaderElection.renewDeadlineSeconds }}s
    - --leader-election-retry-period={{ int $all.leaderElection.retryPeriodSeconds }}s
    {{- end }}
    - --v={{ int $all.logVerbosity }}
    {{- range $all.csiAddons.extraArgs }}
    - {{ . | quote }}
    {{- end }}
  env:
    {{- include "nvmesh-csi.sidecarEnv" .root | nindent 4 }}
    - name: NODE_NAME
      valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
    - name: POD_UID
      valueFrom: {fieldRef: {fieldPath: metadata.uid}}
  ports:
    - {name: csi-addons, containerPort: {{ int .port }}}
  volumeMounts:
    - {name: csi-addons, mountPath: /run/csi-addons}
{{- end -}}

{{- define "nvmesh-csi.provisionerArgs" -}}
{{- $sidecar := .Values.sidecars.provisioner -}}
- --timeout={{ int $sidecar.timeoutSeconds }}s
- --worker-threads={{ int $sidecar.workerThreads }}
- --default-fstype={{ $sidecar.defaultFsType }}
- --extra-create-metadata={{ $sidecar.extraCreateMetadata }}
- --strict-topology={{ $sidecar.strictTopology }}
- --immediate-topology={{ $sidecar.immediateTopology }}
{{- if $sidecar.capacity.enabled }}
- --enable-capacity
# The objects belong to the Deployment, two levels above the pod, so that they outlive pods and end with it.
- --capacity-ownerref-level=2
- --capacity-poll-interval={{ int $sidecar.capacity.pollIntervalSeconds }}s
{{- end }}
{{- end -}}

{{- define "nvmesh-csi.attacherArgs" -}}
{{- $sidecar := .Values.sidecars.attacher -}}
- --timeout={{ int $sidecar.timeoutSeconds }}s
- --worker-threads={{ int $sidecar.workerThreads }}
- --reconcile-sync={{ int $sidecar.reconcileSyncSeconds }}s
- --default-fstype={{ $sidecar.defaultFsType }}
{{- end -}}

{{- define "nvmesh-csi.resizerArgs" -}}
{{- $sidecar := .Values.sidecars.resizer -}}
- --resize-timeout={{ int $sidecar.resizeTimeoutSeconds }}s
- --modify-timeout={{ int $sidecar.modifyTimeoutSeconds }}s
- --workers={{ int $sidecar.workerThreads }}
# Volumes expand in use, so the resizer need not watch pods.
- --handle-volume-inuse-error=false
{{- end -}}

{{- define "nvmesh-csi.snapshotterArgs" -}}
{{- $sidecar := .Values.sidecars.snapshotter -}}
- --timeout={{ int $sidecar.timeoutSeconds }}s
- --worker-threads={{ int $sidecar.workerThreads }}
{{- end -}}
