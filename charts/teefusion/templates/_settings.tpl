{{/* What the chart knows of a run's settings, as nested settings. Of the variables nulls are left out where they are the
     default anyway. */}}
{{- define "teefusion.settings.known" -}}
{{- with include "teefusion.workspace.claim" . }}
workdir: {{ printf "%s/work" $.Values.workspace.mountPath | quote }}
{{- end }}
mlflow:
  tracking_uri: {{ include "teefusion.mlflow.url" . | quote }}
storage:
  uri: {{ include "teefusion.s3.uri" . }}
  endpoint_url: {{ include "teefusion.s3.endpoint" . | default nil | toJson }}
  region: {{ .Values.s3.region | default nil | toJson }}
  addressing_style: {{ .Values.s3.addressingStyle }}
cluster:
  runtime: {{ .Values.training.runtime.name | quote }}
  image: {{ include "teefusion.image" (dict "root" . "stage" "train") }}
  small_image: {{ include "teefusion.image" (dict "root" . "stage" "pipeline") }}
  service_account: {{ .Values.training.serviceAccount.name | quote }}
  {{- with include "teefusion.s3.secret" . }}
  s3_secret: {{ . | quote }}
  {{- end }}
  {{- with include "teefusion.mlflow.secret" . }}
  mlflow_secret: {{ . | quote }}
  {{- end }}
  {{- with .Values.hub.existingSecret }}
  hub_secret: {{ . | quote }}
  {{- end }}
  config_map: {{ .Values.settings.name | quote }}
  env: {{ .Values.settings.env | toJson }}
  run_as_user: {{ .Values.security.runAsUser | toJson }}
  queue: {{ ternary .Values.training.queue.name nil .Values.training.queue.enabled | toJson }}
  {{- with .Values.imagePullSecrets }}
  image_pull_secrets:
    {{- range . }}
    - {{ .name | quote }}
    {{- end }}
  {{- end }}
  {{- with include "teefusion.workspace.claim" . }}
  volume_claim: {{ . | quote }}
  volume_path: {{ $.Values.workspace.mountPath | quote }}
  {{- end }}
kfp:
  service_account: {{ .Values.runner.serviceAccount.name | quote }}
  namespace: {{ ternary .Release.Namespace nil .Values.pipelines.token.enabled | toJson }}
{{- end }}

{{/* What the chart knows, under what settings.values says: nested settings, as a `--config` file has them. */}}
{{- define "teefusion.settings" -}}
{{- mergeOverwrite (include "teefusion.settings.known" . | fromYaml) (deepCopy .Values.settings.values) | toYaml -}}
{{- end }}

{{/* The same as TEEFUSION_* variables. Sections become one level of names; what is nested deeper, and lists, become
     JSON. Numbers as JSON too: Helm would write a million as 1e+06. */}}
{{- define "teefusion.settings.variables" -}}
{{- $all := include "teefusion.settings" . | fromYaml -}}
{{- $data := dict -}}
{{- range $name, $value := $all -}}
{{- if kindIs "map" $value -}}
{{- range $key, $inner := $value -}}
{{- $_ := set $data (printf "TEEFUSION_%s__%s" (upper $name) (upper $key)) $inner -}}
{{- end -}}
{{- else -}}
{{- $_ := set $data (printf "TEEFUSION_%s" (upper $name)) $value -}}
{{- end -}}
{{- end -}}
{{- range $name, $value := $data -}}
{{- if and (kindIs "invalid" $value) (eq $name "TEEFUSION_CLUSTER__RUN_AS_USER") -}}
{{- $_ := set $data $name "null" -}}
{{- else if kindIs "invalid" $value -}}
{{- $_ := unset $data $name -}}
{{- else if not (kindIs "string" $value) -}}
{{- $_ := set $data $name (toJson $value) -}}
{{- end -}}
{{- end -}}
{{- toYaml (merge $data .Values.settings.env) -}}
{{- end }}
