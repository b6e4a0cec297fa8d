{{/* Pods that run vLLM. Arguments and environment are those of `serving/command.py`; tests compare them. */}}

{{/* A size in bytes, from a number or text such as 24GiB. */}}
{{- define "quantgate.bytes" -}}
{{- $text := toString . -}}
{{- if hasSuffix "GiB" $text -}}{{ mul (trimSuffix "GiB" $text | int64) 1073741824 }}
{{- else if hasSuffix "MiB" $text -}}{{ mul (trimSuffix "MiB" $text | int64) 1048576 }}
{{- else -}}{{ int64 . }}{{- end }}
{{- end }}

{{/* GPUs of one pod, from {name, variant}. */}}
{{- define "quantgate.gpusPerPod" -}}
{{- $options := .variant.options -}}
{{- $ranks := mul (default 1 $options.tensor_parallel) (default 1 $options.pipeline_parallel) (default 1 $options.data_parallel) -}}
{{- if mod $ranks .variant.nodes -}}
{{- fail (printf "variants.%s: %d GPUs cannot be divided equally among %d nodes" .name $ranks (int .variant.nodes)) -}}
{{- end -}}
{{ div $ranks .variant.nodes }}
{{- end }}

{{- define "quantgate.drainSeconds" -}}
{{ .variant.options.drain_seconds | default 120 | ceil | int64 }}
{{- end }}

{{/* Arguments of vLLM, from {root, name, variant, isWorker}. */}}
{{- define "quantgate.engineArguments" -}}
{{- $variant := .variant -}}
{{- $options := $variant.options -}}
{{- $command := (index .root.Values.engines $variant.engine).command -}}
{{- $arguments := list (include "quantgate.modelPath" .) -}}
{{- if ne (last $command) "serve" }}{{ $arguments = prepend $arguments "--model" }}{{ end -}}
{{- $arguments = concat $arguments (list "--host" "0.0.0.0" "--port" "8000" "--dtype" (default "auto" $options.dtype)) -}}
{{- $arguments = concat $arguments (list "--tensor-parallel-size" (default 1 $options.tensor_parallel | int64 | toString)) -}}
{{- range $option, $flag := dict "pipeline_parallel" "--pipeline-parallel-size" "data_parallel" "--data-parallel-size" -}}
{{- if gt (int (get $options $option)) 1 }}{{ $arguments = concat $arguments (list $flag (get $options $option | int64 | toString)) }}{{ end -}}
{{- end -}}
{{- range $option, $flag := dict "max_model_len" "--max-model-len" "max_num_seqs" "--max-num-seqs" -}}
{{- if hasKey $options $option }}{{ $arguments = concat $arguments (list $flag (get $options $option | int64 | toString)) }}{{ end -}}
{{- end -}}
{{- $arguments = concat $arguments (list "--max-num-queued-reqs" (default 256 $options.max_queued | int64 | toString)) -}}
{{- $cache := $options.kv_cache_bytes | default (ternary "512MiB" "" (eq $variant.engine "cpu")) -}}
{{- if $cache }}{{ $arguments = concat $arguments (list "--kv-cache-memory-bytes" (include "quantgate.bytes" $cache)) }}{{ end -}}
{{- if ne (default "auto" $options.kv_cache_dtype) "auto" }}{{ $arguments = concat $arguments (list "--kv-cache-dtype" $options.kv_cache_dtype) }}{{ end -}}
{{- if $options.speculative }}{{ $arguments = concat $arguments (list "--speculative-config" (toJson $options.speculative)) }}{{ end -}}
{{- $arguments = concat $arguments (list "--generation-config" "vllm") -}}
{{- if $variant.reasoningParser }}{{ $arguments = concat $arguments (list "--reasoning-parser" $variant.reasoningParser) }}{{ end -}}
{{- if $variant.chatTemplate }}{{ $arguments = concat $arguments (list "--chat-template" "/etc/quantgate/chat-template.jinja") }}{{ end -}}
{{/* Longer than the pod has: vLLM hangs when this ends with requests running. */}}
{{- $arguments = concat $arguments (list "--shutdown-timeout" (include "quantgate.drainSeconds" . | int64 | add 30 | toString)) -}}
{{- if $variant.templateDefaults }}{{ $arguments = concat $arguments (list "--default-chat-template-kwargs" (toJson $variant.templateDefaults)) }}{{ end -}}
{{- $arguments = concat $arguments (list "--fingerprint-mode" "custom" "--fingerprint-value" (default .name $variant.fingerprint)) -}}
{{- $arguments = concat $arguments (list "--disable-access-log-for-endpoints" "/health,/metrics,/load,/v1/models") -}}
{{- if $variant.toolParser }}{{ $arguments = concat $arguments (list "--enable-auto-tool-choice" "--tool-call-parser" $variant.toolParser) }}{{ end -}}
{{- with .root.Values.config.gateway.media_domains }}{{ $arguments = concat (append $arguments "--allowed-media-domains") . }}{{ end -}}
{{- $arguments = concat $arguments (list "--enable-request-id-headers" "--enable-server-load-tracking" "--enable-prompt-tokens-details") -}}
{{- if eq (toString $options.prefix_caching) "false" }}{{ $arguments = append $arguments "--no-enable-prefix-caching" }}{{ end -}}
{{- if $options.expert_parallel }}{{ $arguments = append $arguments "--enable-expert-parallel" }}{{ end -}}
{{- $arguments = concat $arguments (list "--served-model-name" .name) -}}
{{- if gt (int $variant.nodes) 1 -}}
{{/* Kubernetes replaces $(...); the controller of LeaderWorkerSets sets the variables. */}}
{{- $arguments = concat $arguments (list "--nnodes" (toString $variant.nodes) "--node-rank" "$(LWS_WORKER_INDEX)" "--master-addr" "$(LWS_LEADER_ADDRESS)") -}}
{{- if .isWorker }}{{ $arguments = append $arguments "--headless" }}{{ end -}}
{{- end -}}
{{ toYaml (concat $arguments (default list $options.args)) }}
{{- end }}

{{/* Environment of vLLM. Home and caches are on a volume: the root file system is read-only. */}}
{{- define "quantgate.engineEnvironment" -}}
{{- $engine := index .root.Values.engines .variant.engine -}}
- {name: HOME, value: /cache}
- {name: USER, value: vllm}
- {name: VLLM_NO_USAGE_STATS, value: "1"}
- {name: DO_NOT_TRACK, value: "1"}
- {name: HF_HUB_OFFLINE, value: "1"}
- {name: TRANSFORMERS_OFFLINE, value: "1"}
- {name: VLLM_HTTP_TIMEOUT_KEEP_ALIVE, value: "75"}
- {name: VLLM_CACHE_ROOT, value: /cache/vllm}
- {name: PYTHONPYCACHEPREFIX, value: /cache/bytecode}
{{- if .root.Values.config.gateway.media_domains }}
- {name: VLLM_MEDIA_URL_ALLOW_REDIRECTS, value: "0"}
{{- end }}
{{- with .root.Values.engines.apiKey }}
{{- if .existingSecret }}
- name: VLLM_API_KEY
  valueFrom: {secretKeyRef: {name: {{ .existingSecret | quote }}, key: {{ .key | quote }}}}
{{- end }}
{{- end }}
{{- if eq .variant.engine "cpu" }}
- {name: VLLM_CPU_OMP_THREADS_BIND, value: {{ default "nobind" .variant.options.cores | quote }}}
- name: OMP_NUM_THREADS
  valueFrom: {resourceFieldRef: {containerName: engine, resource: limits.cpu}}
{{- else }}
- {name: CUDA_DEVICE_ORDER, value: PCI_BUS_ID}
{{- end }}
{{- with concat $engine.env .variant.env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "quantgate.engineResources" -}}
{{- $resources := deepCopy .variant.resources -}}
{{- $gpu := (index .root.Values.engines .variant.engine).gpuResource -}}
{{- if $gpu -}}
{{- $gpus := include "quantgate.gpusPerPod" . | int64 -}}
{{- $resources = mergeOverwrite $resources (dict "requests" (dict $gpu $gpus) "limits" (dict $gpu $gpus)) -}}
{{- end -}}
{{ toYaml $resources }}
{{- end }}

{{/* Probes of a container that listens. vLLM listens when the model is loaded; until then the startup probe waits. */}}
{{- define "quantgate.engineProbes" -}}
startupProbe:
  httpGet: {path: /health, port: http}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ divf (default 900 .variant.options.start_timeout_seconds) 5 | ceil | int64 }}
livenessProbe:
  httpGet: {path: /health, port: http}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /health, port: http}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 3
{{- end }}

{{/* Pod template of a variant, from {root, name, variant, isWorker}. */}}
{{- define "quantgate.enginePod" -}}
{{- $root := .root -}}
{{- $variant := .variant -}}
{{- $engine := index $root.Values.engines $variant.engine -}}
metadata:
  labels:
    {{- include "quantgate.engineSelector" . | nindent 4 }}
  {{- if or $variant.chatTemplate $variant.podAnnotations }}
  annotations:
    {{- if $variant.chatTemplate }}
    checksum/chat-template: {{ $variant.chatTemplate | sha256sum | quote }}
    {{- end }}
    {{- with $variant.podAnnotations }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- end }}
spec:
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- with $root.Values.imagePullSecrets }}
  imagePullSecrets: {{ toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- include "quantgate.podSecurity" $root.Values.engines.runAsUser | nindent 4 }}
  {{- with $variant.runtimeClassName }}
  runtimeClassName: {{ . | quote }}
  {{- end }}
  {{- with $variant.priorityClassName }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  # Kubernetes kills what is left; requests have the time of drain_seconds until then.
  terminationGracePeriodSeconds: {{ add $root.Values.engines.preStopSeconds (include "quantgate.drainSeconds" . | int64) 15 }}
  containers:
    - name: engine
      image: {{ include "quantgate.image" (dict "root" $root "image" $engine.image) | quote }}
      imagePullPolicy: {{ $engine.image.pullPolicy }}
      command: {{ toYaml $engine.command | nindent 8 }}
      args: {{ include "quantgate.engineArguments" . | nindent 8 }}
      env:
        {{- include "quantgate.engineEnvironment" . | nindent 8 }}
      {{- if not .isWorker }}
      ports:
        - {name: http, containerPort: 8000}
      {{- include "quantgate.engineProbes" . | nindent 6 }}
      {{- end }}
      lifecycle:
        preStop: {sleep: {seconds: {{ int64 $root.Values.engines.preStopSeconds }}}}
      resources: {{ include "quantgate.engineResources" . | nindent 8 }}
      securityContext:
        {{- include "quantgate.containerSecurity" . | nindent 8 }}
      volumeMounts:
        - {name: shm, mountPath: /dev/shm}
        - {name: tmp, mountPath: /tmp}
        - {name: cache, mountPath: /cache}
        {{- if $variant.volume }}
        - {name: model, mountPath: {{ $root.Values.models.mountPath }}/{{ .name }}, readOnly: true}
        {{- else }}
        - {name: models, mountPath: {{ $root.Values.models.mountPath }}, readOnly: true}
        {{- end }}
        {{- if $variant.chatTemplate }}
        - {name: chat-template, mountPath: /etc/quantgate, readOnly: true}
        {{- end }}
  volumes:
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $variant.sharedMemory | quote }}}
    - name: tmp
      emptyDir: {sizeLimit: 10Gi}
    - name: cache
      emptyDir: {sizeLimit: {{ $variant.cacheSize | quote }}}
    {{- if $variant.volume }}
    - name: model
      {{- toYaml $variant.volume | nindent 6 }}
    {{- else }}
    - name: models
      {{- include "quantgate.modelVolume" $root | required "models.volume: set it, or models.claim.create, or a volume of each variant" | nindent 6 }}
    {{- end }}
    {{- if $variant.chatTemplate }}
    - name: chat-template
      configMap: {name: {{ include "quantgate.variantName" . }}-template}
    {{- end }}
  {{- with $variant.nodeSelector }}
  nodeSelector: {{ toYaml . | nindent 4 }}
  {{- end }}
  {{- with $variant.tolerations }}
  tolerations: {{ toYaml . | nindent 4 }}
  {{- end }}
  {{- with $variant.affinity }}
  affinity: {{ toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
