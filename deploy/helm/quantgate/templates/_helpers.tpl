{{/* Names and labels. */}}

{{- define "quantgate.name" -}}
{{ default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* Beginning of all names, short enough for the suffixes. */}}
{{- define "quantgate.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{ .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "quantgate.name" .) .Release.Name -}}
{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-%s" .Release.Name (include "quantgate.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/*
Name of a variant's objects, from {root, name}. At most 48 characters: the controllers of Deployments, LeaderWorkerSets
and StatefulSets append to it, and pods have it in labels of 63. A longer name ends in a digest, so it stays unique.
*/}}
{{- define "quantgate.variantName" -}}
{{- $name := printf "%s-%s" (include "quantgate.fullname" .root) .name -}}
{{- if gt (len $name) 48 -}}
{{ printf "%s-%s" ($name | trunc 39 | trimSuffix "-") ($name | sha256sum | trunc 8) }}
{{- else -}}
{{ $name }}
{{- end }}
{{- end }}

{{/* Name of a variant's workload. A LeaderWorkerSet creates a Service of its own name, so it differs from ours. */}}
{{- define "quantgate.workloadName" -}}
{{ include "quantgate.variantName" . }}{{ if gt (int .variant.nodes) 1 }}-lws{{ end }}
{{- end }}

{{/*
`replicas` of a variant's workload, from {root, name, variant}. With `autoscaled` no revision of the release has it, so
neither upgrades nor rollbacks of the release change the number.
*/}}
{{- define "quantgate.replicas" -}}
{{- if not .variant.autoscaled -}}
replicas: {{ .variant.replicas }}
{{- else if ne (int .variant.replicas) 1 -}}
{{- fail (printf "variants.%s.replicas: with autoscaled, a new workload starts with 1 pod; leave replicas out, and use kubectl scale" .name) -}}
{{- end -}}
{{- end }}

{{/* Labels that never change: selectors are immutable. */}}
{{- define "quantgate.selectorLabels" -}}
app.kubernetes.io/name: {{ include "quantgate.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "quantgate.gatewaySelector" -}}
{{ include "quantgate.selectorLabels" . }}
app.kubernetes.io/component: gateway
{{- end }}

{{- define "quantgate.engineSelector" -}}
{{ include "quantgate.selectorLabels" .root }}
app.kubernetes.io/component: engine
quantgate.io/variant: {{ .name | quote }}
{{- end }}

{{/* Labels of objects. Pod templates do not have them: a new version of the chart would restart engines. */}}
{{- define "quantgate.labels" -}}
{{ include "quantgate.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Image reference, from {root, image}. */}}
{{- define "quantgate.image" -}}
{{- $image := .image -}}
{{- if $image.digest -}}
{{ printf "%s@%s" $image.repository $image.digest }}
{{- else -}}
{{ printf "%s:%s" $image.repository (default .root.Chart.AppVersion $image.tag) }}
{{- end }}
{{- end }}

{{/* Variants with the defaults of each, as YAML. */}}
{{- define "quantgate.variants" -}}
{{- $variants := dict -}}
{{- range $name, $variant := .Values.variants -}}
{{- $_ := set $variants $name (mergeOverwrite (deepCopy $.Values.variantDefaults) (default dict $variant)) -}}
{{- end -}}
{{ toYaml $variants }}
{{- end }}

{{/* Source of the volume with the models, as YAML; empty without one. */}}
{{- define "quantgate.modelVolume" -}}
{{- if .Values.models.volume -}}
{{ toYaml .Values.models.volume }}
{{- else if .Values.models.claim.create -}}
persistentVolumeClaim: {claimName: {{ include "quantgate.fullname" . }}-models, readOnly: true}
{{- end }}
{{- end }}

{{/* Model directory of a variant in its pods, from {root, name, variant}. */}}
{{- define "quantgate.modelPath" -}}
{{- $path := default .name .variant.path -}}
{{- if hasPrefix "/" $path -}}{{ $path }}{{- else -}}{{ .root.Values.models.mountPath }}/{{ $path }}{{- end }}
{{- end }}

{{/* Security context of all containers. */}}
{{- define "quantgate.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "quantgate.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ int64 . }}
runAsGroup: {{ int64 . }}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "quantgate.gatewaySecret" -}}
{{ .Values.gateway.existingSecret | required "gateway.existingSecret: name a Secret with admin-key and keys.yaml (README.md shows how to create it)" }}
{{- end }}
