{{/* The program's arguments. */}}

{{/* Flags by their names in camelCase, as arguments. A list is a flag that is repeated. */}}
{{- define "nvmesh-csi.flags" -}}
{{- range $name, $value := . }}
{{- range $one := (kindIs "slice" $value | ternary $value (list $value)) }}
- {{ printf "--%s=%s" (kebabcase $name) (include "nvmesh-csi.word" $one) | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* A value as a word: numbers out of YAML are floating point, and 1000000 would be 1e+06. */}}
{{- define "nvmesh-csi.word" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) -}}
{{- int64 . -}}
{{- else -}}
{{- toString . -}}
{{- end -}}
{{- end -}}

{{/* Flags of every role. Call with (dict "root" $ "role" NAME). */}}
{{- define "nvmesh-csi.logArgs" -}}
- --log-level={{ (index .root.Values .role).logLevel | default .root.Values.logLevel }}
- --log-format={{ .root.Values.logFormat }}
{{- with .root.Values.tracing }}
{{- if .endpoint }}
- --tracing-endpoint={{ .endpoint }}
- --tracing-sample-ratio={{ regexReplaceAll "[.]?0+$" (printf "%.6f" (float64 .sampleRatio)) "" }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Flags of controller and node. Call as above. */}}
{{- define "nvmesh-csi.commonArgs" -}}
- --driver-name={{ .root.Values.driverName }}
{{- with .root.Values.zone }}
- --zone={{ . }}
{{- end }}
{{- with include "nvmesh-csi.topologyKey" .root }}
- --topology-key={{ . }}
{{- end }}
{{- with .root.Values.maxVolumesPerNode }}
- --max-volumes-per-node={{ int64 . }}
{{- end }}
{{- if ne .root.Values.attachBy "controller" }}
- --attach-by={{ .root.Values.attachBy }}
{{- end }}
{{- if .root.Values.events.enabled }}
- --events
{{- end }}
{{ include "nvmesh-csi.logArgs" . }}
{{- end -}}

{{/* Address of a role's HTTP server, without the port: empty is every address. Call with (dict "root" $ "role" NAME). */}}
{{- define "nvmesh-csi.httpHost" -}}
{{- $values := index .root.Values .role -}}
{{- $values.http.host | default (ternary "127.0.0.1" "" (eq (include "nvmesh-csi.hostNetwork" .) "true")) -}}
{{- end -}}

{{- define "nvmesh-csi.httpArg" -}}
{{- with (index .root.Values .role).http.port -}}
- --http-listen={{ include "nvmesh-csi.httpHost" $ }}:{{ int . }}
{{- end -}}
{{- end -}}

{{/* Probes of the driver's container. Call with (dict "root" $ "role" NAME "sidecarPort" PORT). */}}
{{- define "nvmesh-csi.probes" -}}
{{- $host := include "nvmesh-csi.httpHost" . -}}
{{- $port := (index .root.Values .role).http.port -}}
{{- $sidecar := and .sidecarPort .root.Values.sidecars.livenessprobe.enabled -}}
{{- if or $sidecar $port }}
livenessProbe:
  httpGet:
    path: /healthz
    port: {{ ternary "healthz" "http" (not (not $sidecar)) }}
    {{- if $sidecar }}
    {{- if include "nvmesh-csi.hostNetwork" . }}
    host: 127.0.0.1
    {{- end }}
    {{- else if hasPrefix "127." $host }}
    host: {{ $host }}
    {{- end }}
  initialDelaySeconds: 5
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 5
{{- end }}
{{- if and $port (index .root.Values .role).drive }}
# Before a drive is formatted every block of it is read.
startupProbe:
  httpGet:
    path: /healthz
    port: http
    {{- if hasPrefix "127." $host }}
    host: {{ $host }}
    {{- end }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 8640
{{- end }}
{{- if $port }}
readinessProbe:
  httpGet:
    path: /readyz
    port: http
    {{- if hasPrefix "127." $host }}
    host: {{ $host }}
    {{- end }}
  initialDelaySeconds: 2
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 3
{{- end }}
{{- end -}}
