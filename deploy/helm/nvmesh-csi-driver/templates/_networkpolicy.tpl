{{/* A rule that lets out to addresses. Call with VALUES that have cidrs and ports. */}}
{{- define "nvmesh-csi.egressTo" -}}
- to:
    {{- range .cidrs }}
    - ipBlock: {cidr: {{ . | quote }}}
    {{- end }}
  ports:
    {{- range .ports }}
    - {port: {{ int . }}, protocol: TCP}
    {{- end }}
{{- end -}}
