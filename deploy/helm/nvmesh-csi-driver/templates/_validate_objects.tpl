{{/* Values that the API server would refuse are refused before anything is installed. Shapes are the schema's; here are
     the rules that it cannot express, or not in words. */}}

{{/* Check every value below one by its name. Call with (dict "place" PATH "value" MAPPING). */}}
{{- define "nvmesh-csi.validateByName" -}}
{{- range $key, $value := .value -}}
{{- $place := printf "%s%s%v" $.place (ternary "." "" (ne $.place "")) $key -}}
{{- $one := dict "place" $place "value" $value -}}
{{- if has $key (list "labels" "podLabels" "commonLabels" "nodeSelector" "matchLabels") -}}
{{- include "nvmesh-csi.validateLabels" $one -}}
{{- else if has $key (list "annotations" "podAnnotations") -}}
{{- include "nvmesh-csi.validateAnnotations" $one -}}
{{- else if eq $key "tolerations" -}}
{{- range $value -}}{{- include "nvmesh-csi.validateToleration" (dict "place" $place "value" .) -}}{{- end -}}
{{- else if kindIs "map" $value -}}
{{- include "nvmesh-csi.validateByName" $one -}}
{{- else if kindIs "slice" $value -}}
{{- range $number, $item := $value -}}
{{- if kindIs "map" $item -}}
{{- include "nvmesh-csi.validateByName" (dict "place" (printf "%s[%d]" $place $number) "value" $item) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "nvmesh-csi.validateLabels" -}}
{{- range $key, $value := .value -}}
{{- include "nvmesh-csi.validateKey" (dict "place" $.place "key" $key "what" "label") -}}
{{- if not (include "nvmesh-csi.isLabelValue" $value) -}}
{{- fail (printf "%s: label %s: expected at most 63 letters, digits, '-', '_' and '.', with a letter or digit at both ends, got %q; write it as an annotation, or shorten it" $.place $key $value) -}}
{{- end -}}
{{- $isOwn := or (hasPrefix "app.kubernetes.io/" $key) (hasPrefix "helm.sh/" $key) (eq $key "nvmesh-csi/daemonset") -}}
{{- /* Nothing finds monitors, rules, dashboards or classes by the chart's labels. */ -}}
{{- $isFree := or (hasPrefix "monitoring." $.place) (contains "lasses[" $.place) (hasSuffix "odeSelector" $.place) (hasSuffix "matchLabels" $.place) -}}
{{- if and $isOwn (not $isFree) -}}
{{- fail (printf "%s has the label %s: labels below app.kubernetes.io and helm.sh are set by the chart, which finds its pods by them; rename it" $.place $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "nvmesh-csi.validateAnnotations" -}}
{{- $bytes := 0 -}}
{{- range $key, $value := .value -}}
{{- include "nvmesh-csi.validateKey" (dict "place" $.place "key" (lower $key) "what" "annotation") -}}
{{- $bytes = add $bytes (len $key) (len $value) -}}
{{- end -}}
{{- if gt $bytes 200000 -}}
{{- fail (printf "%s: expected at most 200000 bytes, got %d; that is Kubernetes' limit: put the content into a ConfigMap" .place $bytes) -}}
{{- end -}}
{{- end -}}

{{/* A key of labels or annotations: a name of at most 63 characters, or DOMAIN/NAME. */}}
{{- define "nvmesh-csi.validateKey" -}}
{{- $name := regexMatch "^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$" .key -}}
{{- if not (and $name (regexMatch "^([^/]{1,253}/)?[^/]*$" .key)) -}}
{{- fail (printf "%s: %s %q: expected a key as NAME or example.com/NAME, the domain in lower case, NAME of at most 63 letters, digits, '-', '_' and '.' with a letter or digit at both ends; rename it" .place .what .key) -}}
{{- end -}}
{{- end -}}

{{- define "nvmesh-csi.validateToleration" -}}
{{- $given := toJson .value -}}
{{- $operator := .value.operator | default "Equal" -}}
{{- $value := .value.value | default "" -}}
{{- if and (not .value.key) (ne $operator "Exists") -}}
{{- fail (printf "%s: %s has no key: a toleration of every taint needs operator: Exists; add it, or name the key" .place $given) -}}
{{- else if and (eq $operator "Exists") $value -}}
{{- fail (printf "%s: %s has a value, which operator: Exists ignores and Kubernetes refuses; remove the value, or use operator: Equal" .place $given) -}}
{{- else if and (hasKey .value "tolerationSeconds") (ne (.value.effect | default "") "NoExecute") -}}
{{- fail (printf "%s: %s has tolerationSeconds, which need effect: NoExecute; set the effect, or remove the seconds" .place $given) -}}
{{- else if not (include "nvmesh-csi.isLabelValue" $value) -}}
{{- fail (printf "%s: value of %s: expected at most 63 letters, digits, '-', '_' and '.', as taints have; correct it" .place $given) -}}
{{- end -}}
{{- end -}}

{{- define "nvmesh-csi.isLabelValue" -}}
{{- if regexMatch "^([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?$" . -}}true{{- end -}}
{{- end -}}

{{/* Number of a quantity such as 100m or 1Gi, as text. */}}
{{- define "nvmesh-csi.number" -}}
{{- $parts := regexFind "^[0-9.]+([eE][+-]?[0-9]+)?" (toString .) -}}
{{- $unit := trimPrefix $parts (toString .) -}}
{{- $units := dict "" 1.0 "n" 1e-9 "u" 1e-6 "m" 1e-3 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "E" 1e18 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 "Pi" 1125899906842624.0 "Ei" 1152921504606846976.0 -}}
{{- mulf (float64 $parts) (get $units $unit) -}}
{{- end -}}

{{/* Check the pods of the rendered workloads: parts of the chart and of the values must fit together. */}}
{{- define "nvmesh-csi.validatePods" -}}
{{- range $role := list "controller" "node" "storage" -}}
{{- range $text := include (printf "%s/%s.yaml" $.Template.BasePath $role) $ | splitList "\n---\n" -}}
{{- $spec := (fromYaml $text).spec | default dict -}}
{{- if hasKey $spec "template" -}}
{{- $additional := get $spec.template.metadata.labels "nvmesh-csi/daemonset" -}}
{{- include "nvmesh-csi.validatePod" (dict "place" (ternary (printf "additionalDaemonSets.%s" $additional) $role (ne $additional "")) "role" $role "pod" $spec.template.spec) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "nvmesh-csi.validatePod" -}}
{{- $place := .place -}}
{{- $pod := .pod -}}
{{- $volumes := list -}}
{{- range $pod.volumes -}}
{{- if has .name $volumes -}}
{{- fail (printf "%s.extraVolumes: name %s is used twice, or is the name of a volume of the chart; rename the volume" $place .name) -}}
{{- end -}}
{{- $volumes = append $volumes .name -}}
{{- $paths := list -}}
{{- range dig "sources" list (.projected | default dict) -}}
{{- range concat (dig "configMap" "items" list .) (dig "secret" "items" list .) (dig "downwardAPI" "items" list .) (list (dig "serviceAccountToken" dict .)) -}}
{{- if has .path (compact $paths) -}}
{{- fail (printf "%s.extraVolumes: path %s is used twice in a projected volume; rename one" $place .path) -}}
{{- end -}}
{{- $paths = append $paths .path -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $names := list -}}
{{- range concat $pod.containers ($pod.initContainers | default list) -}}
{{- if has .name $names -}}
{{- fail (printf "%s.initContainers: name %s is used twice, or is the name of a container of the chart; rename the container" $place .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- $isInit := has . ($pod.initContainers | default list) -}}
{{- include "nvmesh-csi.validateContainer" (dict "place" $place "role" $.role "pod" $pod "volumes" $volumes "container" . "isInit" $isInit) -}}
{{- end -}}
{{- if and (eq ($pod.dnsPolicy | default "") "None") (not (dig "dnsConfig" "nameservers" list $pod)) -}}
{{- fail (printf "%s.dnsPolicy: None uses only the name servers of dnsConfig, and there are none; set %s.dnsConfig.nameservers" $place $place) -}}
{{- end -}}
{{- if gt (dig "dnsConfig" "searches" list $pod | join " " | len) 2048 -}}
{{- fail (printf "%s.dnsConfig.searches: expected at most 2048 characters together; remove some" $place) -}}
{{- end -}}
{{- $spread := list -}}
{{- range $pod.topologySpreadConstraints -}}
{{- $pair := printf "%s with %s" .topologyKey .whenUnsatisfiable -}}
{{- if has $pair $spread -}}
{{- fail (printf "%s.topologySpreadConstraints: %s is there twice; remove one" $place $pair) -}}
{{- else if and .minDomains (ne .whenUnsatisfiable "DoNotSchedule") -}}
{{- fail (printf "%s.topologySpreadConstraints: %s has minDomains, which need whenUnsatisfiable: DoNotSchedule; remove minDomains" $place $pair) -}}
{{- end -}}
{{- $spread = append $spread $pair -}}
{{- end -}}
{{- end -}}

{{- define "nvmesh-csi.validateContainer" -}}
{{- $name := .container.name -}}
{{- $isDriver := and (not .isInit) (has $name (list "driver" "storage")) -}}
{{- /* Names of the values that the container's parts come from. */ -}}
{{- $base := ternary .place (printf "sidecars.%s" $name) $isDriver -}}
{{- $all := ternary .place "sidecars" $isDriver -}}
{{- if .isInit -}}
{{- $base = printf "%s.initContainers.%s" .place $name -}}
{{- $all = $base -}}
{{- end -}}
{{- $mounts := printf "%s.%s" $base (ternary "volumeMounts" "extraVolumeMounts" .isInit) -}}
{{- $security := .container.securityContext | default dict -}}
{{- $pod := .pod.securityContext | default dict -}}
{{- $user := int64 (ternary $security.runAsUser (dig "runAsUser" 1 $pod) (hasKey $security "runAsUser")) -}}
{{- $nonRoot := ternary $security.runAsNonRoot (dig "runAsNonRoot" false $pod) (hasKey $security "runAsNonRoot") -}}
{{- if and $isDriver (ne .role "controller") (not (and $security.privileged (eq $user 0) (not $nonRoot))) -}}
{{- fail (printf "%s.securityContext: the %s role mounts filesystems and makes devices, for which it needs privileged: true and the user 0; remove privileged, runAsUser and runAsNonRoot" $all .role) -}}
{{- end -}}
{{- if and $nonRoot (eq $user 0) -}}
{{- fail (printf "%s.securityContext: user 0 is root, but runAsNonRoot is true; kubelet would not start the container: choose another user" $all) -}}
{{- end -}}
{{- $added := dig "capabilities" "add" list $security -}}
{{- $escalates := or $security.privileged (has "SYS_ADMIN" $added) (has "CAP_SYS_ADMIN" $added) -}}
{{- if and $escalates (hasKey $security "allowPrivilegeEscalation") (not $security.allowPrivilegeEscalation) -}}
{{- fail (printf "%s.securityContext: a privileged container, or one with SYS_ADMIN, cannot have allowPrivilegeEscalation: false; remove one of them" $all) -}}
{{- end -}}
{{- $paths := list -}}
{{- range .container.volumeMounts -}}
{{- if not (has .name $.volumes) -}}
{{- fail (printf "%s: mounts the volume %s, which the pod does not have; add it to %s.extraVolumes, or correct the name" $mounts .name $.place) -}}
{{- else if has .mountPath $paths -}}
{{- fail (printf "%s: mountPath %s is used twice, or is a path of the chart; mount the volume %s elsewhere" $mounts .mountPath .name) -}}
{{- else if and (eq (.mountPropagation | default "") "Bidirectional") (not $security.privileged) -}}
{{- fail (printf "%s: the volume %s has mountPropagation: Bidirectional, which needs a privileged container; use HostToContainer" $mounts .name) -}}
{{- end -}}
{{- $paths = append $paths .mountPath -}}
{{- end -}}
{{- $variables := list -}}
{{- range .container.env -}}
{{- if has .name $variables -}}
{{- fail (printf "%s.%s: sets %s twice, or hides a variable of the chart; remove it" $base (ternary "env" "extraEnv" $.isInit) .name) -}}
{{- end -}}
{{- $variables = append $variables .name -}}
{{- end -}}
{{- $limits := dig "limits" dict (.container.resources | default dict) -}}
{{- range $what, $request := dig "requests" dict (.container.resources | default dict) -}}
{{- $limit := get $limits $what -}}
{{- if and (hasKey $limits $what) (lt (include "nvmesh-csi.number" $limit | float64) (include "nvmesh-csi.number" $request | float64)) -}}
{{- fail (printf "%s.resources: the limit of %s, %v, is below the request, %v (the chart's default where you set none); raise limits.%s, or lower requests.%s" $base $what $limit $request $what $what) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* maxUnavailable and maxSurge of a rollout, of which one must let it go on. Call with (dict "place" PATH "strategy"
     VALUES "isDaemonSet" BOOL). */}}
{{- define "nvmesh-csi.validateRollout" -}}
{{- $rolling := .strategy.rollingUpdate -}}
{{- if and (eq .strategy.type "RollingUpdate") $rolling -}}
{{- $surge := get $rolling "maxSurge" | toString | trimSuffix "%" | int -}}
{{- $away := get $rolling "maxUnavailable" | toString | trimSuffix "%" | int -}}
{{- if and (hasKey $rolling "maxSurge") (hasKey $rolling "maxUnavailable") (eq $surge 0) (eq $away 0) -}}
{{- fail (printf "%s.updateStrategy.rollingUpdate: maxSurge and maxUnavailable are both 0: no pod could ever be replaced; raise one" .place) -}}
{{- else if and .isDaemonSet (ne $surge 0) (ne $away 0) -}}
{{- fail (printf "%s.updateStrategy.rollingUpdate: a DaemonSet takes maxSurge %v only with maxUnavailable 0, got %v; set one of them to 0" .place $rolling.maxSurge $rolling.maxUnavailable) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Names of classes of one kind must differ. Call with (dict "place" PATH "classes" LIST). */}}
{{- define "nvmesh-csi.validateNames" -}}
{{- $names := list -}}
{{- range .classes -}}
{{- if has .name $names -}}
{{- fail (printf "%s: name %s is used twice: rename one" $.place .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- end -}}
