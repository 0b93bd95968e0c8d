{{/* What the schema cannot say: values that contradict one another. Each message says what is and what was wanted. */}}
{{- define "nvmesh-csi.validate" -}}
{{- $v := .Values -}}
{{- $embedded := include "nvmesh-csi.isEmbedded" . -}}
{{- $clusters := include "nvmesh-csi.clusters" . -}}
{{- if $v.sidecars.snapshotter.enabled -}}
{{- fail "sidecars.snapshotter.enabled is true, but the driver offers no snapshots: leave it false" -}}
{{- end -}}
{{- if not (or $embedded $clusters $v.management.servers) -}}
{{- fail "no storage management is given: set management.servers, management.zones or management.existingClusters, or storage.enabled for the embedded manager" -}}
{{- end -}}
{{- if and $clusters $v.management.servers -}}
{{- fail "management.servers and a description of several clusters (management.zones or management.existingClusters) are both given, wanted one" -}}
{{- end -}}
{{- $existing := $v.management.existingClusters -}}
{{- if or (and $existing.secret $existing.configMap) (and $v.management.zones (or $existing.secret $existing.configMap)) -}}
{{- fail "management.zones, management.existingClusters.secret and management.existingClusters.configMap: more than one is given, wanted one" -}}
{{- end -}}
{{- if and $v.management.servers (not (or $v.management.existingSecret $v.management.tls.clientCertificateSecret)) -}}
{{- fail "management.servers is given without credentials: name a Secret in management.existingSecret, or in management.tls.clientCertificateSecret" -}}
{{- end -}}
{{- range $zone, $cluster := $v.management.zones -}}
{{- $tls := $cluster.tls | default dict -}}
{{- if not (or $cluster.existingSecret $tls.clientCertificateSecret $v.management.existingSecret $v.management.tls.clientCertificateSecret) -}}
{{- fail (printf "management.zones.%s is given without credentials: name a Secret in its existingSecret or tls.clientCertificateSecret, or one for all zones in management.existingSecret" $zone) -}}
{{- end -}}
{{- end -}}
{{- if and $v.storage.enabled (not $v.storage.nodeName) -}}
{{- fail "storage.enabled is true and storage.nodeName is empty: name the Kubernetes node that holds the pool; on another one the manager would begin with an empty pool" -}}
{{- end -}}
{{- include "nvmesh-csi.validateGrace" (dict "role" "controller" "values" $v.controller) -}}
{{- include "nvmesh-csi.validateGrace" (dict "role" "node" "values" $v.node) -}}
{{- end -}}

{{/* The time that a pod gets to end must hold what the driver was told to take. Times with units are not looked at. */}}
{{- define "nvmesh-csi.validateGrace" -}}
{{- $drain := dig "drainSeconds" 30 .values.flags -}}
{{- $delay := dig "preShutdownDelay" 0 .values.flags -}}
{{- if not (or (kindIs "string" $drain) (kindIs "string" $delay)) -}}
{{- $needs := addf $drain $delay -}}
{{- if le (float64 .values.terminationGracePeriodSeconds) $needs -}}
{{- fail (printf "%s.terminationGracePeriodSeconds is %v, wanted more than the %v seconds that --drain-seconds and --pre-shutdown-delay take together" .role .values.terminationGracePeriodSeconds $needs) -}}
{{- end -}}
{{- end -}}
{{- end -}}
