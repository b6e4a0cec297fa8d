{{/* quantgate.yaml: the values of `config`, and what the chart knows. */}}

{{- define "quantgate.config" -}}
{{- $config := dict
  "gateway" (include "quantgate.config.gateway" . | fromYaml)
  "variants" (mergeOverwrite (include "quantgate.config.variants" . | fromYaml) (deepCopy .Values.config.variants))
  "replicas" (concat (include "quantgate.config.replicas" . | fromYamlArray) .Values.config.replicas)
  "aliases" .Values.config.aliases -}}
{{ toYaml $config }}
{{- end }}

{{- define "quantgate.config.gateway" -}}
{{- $gateway := dict
  "listen" "0.0.0.0:8000"
  "admin" "0.0.0.0:8001"
  "admin_key" "${env:QUANTGATE_ADMIN_KEY}"
  "keys" "keys.yaml"
  "state" (ternary "${env:QUANTGATE_STATE}" "sqlite:////var/lib/quantgate/state.db" (ne .Values.gateway.state.existingSecret "")) -}}
{{- if .Values.gateway.tls.existingSecret -}}
{{- $_ := set $gateway "tls" (dict "certificate" "/etc/quantgate-tls/tls.crt" "key_file" "/etc/quantgate-tls/tls.key") -}}
{{- end -}}
{{ toYaml (mergeOverwrite $gateway (deepCopy .Values.config.gateway)) }}
{{- end }}

{{/* With the models mounted, quality is what manifests say; a volume of one variant is mounted in its pods only. */}}
{{- define "quantgate.config.variants" -}}
{{- $root := . -}}
{{- $variants := dict -}}
{{- range $name, $variant := include "quantgate.variants" . | fromYaml -}}
{{- $entry := dict -}}
{{- if and $root.Values.models.mountInGateway (not $variant.volume) -}}
{{- $_ := set $entry "path" (include "quantgate.modelPath" (dict "root" $root "name" $name "variant" $variant)) -}}
{{- else if not $variant.precision -}}
{{- fail (printf "variants.%s: the gateway does not see its manifest: set precision, and quality if a floor shall be met" $name) -}}
{{- end -}}
{{- if $variant.precision }}{{ $_ := set $entry "precision" $variant.precision }}{{ end -}}
{{- if and $variant.quality (not $entry.path) }}{{ $_ := set $entry "quality" $variant.quality }}{{ end -}}
{{- $_ := set $variants $name $entry -}}
{{- end -}}
{{ toYaml $variants }}
{{- end }}

{{- define "quantgate.config.replicas" -}}
{{- $root := . -}}
{{- $replicas := list -}}
{{- range $name, $variant := include "quantgate.variants" . | fromYaml -}}
{{- $names := dict "root" $root "name" $name "variant" $variant -}}
{{- $pods := dict
  "service" (include "quantgate.variantName" $names)
  "namespace" $root.Release.Namespace
  "port" "http" -}}
{{- if $root.Values.rollouts.scale -}}
{{- $kind := ternary "leaderworkerset" "deployment" (gt (int $variant.nodes) 1) -}}
{{- $_ := set $pods "workload" (printf "%s/%s" $kind (include "quantgate.workloadName" $names)) -}}
{{- end -}}
{{- $entry := dict "variant" $name "kubernetes" $pods -}}
{{- if $root.Values.engines.apiKey.existingSecret }}{{ $_ := set $entry "api_key" "${env:QUANTGATE_ENGINE_KEY}" }}{{ end -}}
{{- if hasKey $variant.options "max_in_flight" }}{{ $_ := set $entry "max_in_flight" $variant.options.max_in_flight }}{{ end -}}
{{- $replicas = append $replicas $entry -}}
{{- end -}}
{{ toYaml $replicas }}
{{- end }}

{{/* What takes effect at the next start only, and so restarts the pods: these options, and the first external model. */}}
{{- define "quantgate.config.restart" -}}
{{- $gateway := include "quantgate.config.gateway" . | fromYaml -}}
{{- $options := pick $gateway "listen" "admin" "admin_key" "state" "allowed_hosts" "access_log" "per_key_metrics" "usage_days" "tracing" "kubernetes" -}}
{{- range .Values.config.variants }}{{ if .external }}{{ $_ := set $options "external" true }}{{ end }}{{ end -}}
{{ $options | toJson | sha256sum }}
{{- end }}
