{{/* What the chart knows of a run's settings, as nested settings; nulls are left out of the variables. */}}
{{- define "teefusion.settings.known" -}}
{{- with include "teefusion.workspace.claim" . }}
workdir: {{ $.Values.workspace.mountPath }}/work
{{- end }}
mlflow:
  tracking_uri: {{ include "teefusion.mlflow.url" . | quote }}
storage:
  uri: {{ include "teefusion.s3.uri" . }}
  endpoint_url: {{ include "teefusion.s3.endpoint" . | default nil | toJson }}
  region: {{ .Values.s3.region | default nil | toJson }}
  addressing_style: {{ .Values.s3.addressingStyle }}
cluster:
  runtime: {{ .Values.training.runtime.name }}
  image: {{ include "teefusion.image" (dict "root" . "stage" "train") }}
  small_image: {{ include "teefusion.image" (dict "root" . "stage" "pipeline") }}
  service_account: {{ .Values.training.serviceAccount.name }}
  s3_secret: {{ include "teefusion.s3.secret" . | default nil | toJson }}
  mlflow_secret: {{ include "teefusion.mlflow.secret" . | default nil | toJson }}
  hub_secret: {{ .Values.hub.existingSecret | default nil | toJson }}
  env: {{ .Values.settings.env | toJson }}
  run_as_user: {{ .Values.security.runAsUser | toJson | quote }}
  queue: {{ ternary .Values.training.queue.name nil .Values.training.queue.enabled | toJson }}
  {{- with .Values.imagePullSecrets }}
  image_pull_secrets:
    {{- range . }}
    - {{ .name }}
    {{- end }}
  {{- end }}
  {{- with include "teefusion.workspace.claim" . }}
  volume_claim: {{ . }}
  volume_path: {{ $.Values.workspace.mountPath }}
  {{- end }}
{{- end }}

{{/* TEEFUSION_* variables: what the chart knows, under what settings.values says. Sections become one level of names;
     what is nested deeper, and lists, become JSON. Numbers as JSON too: Helm would write a million as 1e+06. */}}
{{- define "teefusion.settings.variables" -}}
{{- $all := mergeOverwrite (include "teefusion.settings.known" . | fromYaml) (deepCopy .Values.settings.values) -}}
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
{{- if kindIs "invalid" $value -}}
{{- $_ := unset $data $name -}}
{{- else if not (kindIs "string" $value) -}}
{{- $_ := set $data $name (toJson $value) -}}
{{- end -}}
{{- end -}}
{{- toYaml (merge $data .Values.settings.env) -}}
{{- end }}
