{{- define "teefusion.mlflow.databaseSecret" -}}
{{- if .Values.postgresql.enabled -}}
name: {{ include "teefusion.componentName" (dict "root" . "component" "postgresql") }}
key: uri
{{- else -}}
name: {{ .Values.mlflow.database.existingSecret | quote }}
key: {{ .Values.mlflow.database.key | quote }}
{{- end -}}
{{- end }}

{{/* Hosts by which people reach MLflow from outside the cluster, with commas between. */}}
{{- define "teefusion.mlflow.outsideHosts" -}}
{{- $ingress := .Values.mlflow.ingress -}}
{{- concat (ternary (list $ingress.host) (list) $ingress.enabled) .Values.mlflow.allowedHosts | join "," -}}
{{- end }}

{{/* Origins of the UI's own requests: MLflow blocks a POST from any other. Whether TLS ends before it, it cannot know. */}}
{{- define "teefusion.mlflow.allowedOrigins" -}}
{{- $origins := list -}}
{{- range splitList "," (include "teefusion.mlflow.outsideHosts" .) | compact -}}
{{- $origins = concat $origins (list (printf "http://%s" .) (printf "https://%s" .)) -}}
{{- end -}}
{{- join "," $origins -}}
{{- end }}

{{/* Hosts that MLflow answers to. It compares them with the port, and knows no Kubernetes names by itself; a monitor
     asks by the pod's address. */}}
{{- define "teefusion.mlflow.allowedHosts" -}}
{{- $service := include "teefusion.componentName" (dict "root" . "component" "mlflow") -}}
{{- $hosts := list "localhost:*" "127.0.0.1:*" "$(POD_IP):5000" -}}
{{- $domain := .Values.clusterDomain -}}
{{- range $name := list $service (printf "%s.%s" $service .Release.Namespace) (printf "%s.%s.svc" $service .Release.Namespace) (printf "%s.%s.svc.%s" $service .Release.Namespace $domain) -}}
{{- $hosts = append $hosts (printf "%s:5000" $name) -}}
{{- end -}}
{{- append $hosts (include "teefusion.mlflow.outsideHosts" .) | compact | join "," -}}
{{- end }}

{{/* Variables of everything that runs in the MLflow image. */}}
{{- define "teefusion.mlflow.env" -}}
MLFLOW_BACKEND_STORE_URI:
  secretKeyRef:
    {{- include "teefusion.mlflow.databaseSecret" . | nindent 4 }}
MLFLOW_DISABLE_TELEMETRY: "true"
# Else a process for each kind of job (of evaluating traces and prompts) runs beside the server, and takes its memory.
MLFLOW_SERVER_ENABLE_JOB_EXECUTION: "false"
MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE: {{ .Values.s3.addressingStyle }}
HOME: /tmp
USER: mlflow
{{- with include "teefusion.s3.secret" . }}
AWS_ACCESS_KEY_ID: {secretKeyRef: {name: {{ . | quote }}, key: TEEFUSION_S3_ACCESS_KEY_ID}}
AWS_SECRET_ACCESS_KEY: {secretKeyRef: {name: {{ . | quote }}, key: TEEFUSION_S3_SECRET_ACCESS_KEY}}
AWS_SESSION_TOKEN: {secretKeyRef: {name: {{ . | quote }}, key: TEEFUSION_S3_SESSION_TOKEN, optional: true}}
{{- end }}
{{- with include "teefusion.s3.endpoint" . }}
MLFLOW_S3_ENDPOINT_URL: {{ . }}
{{- end }}
{{- with .Values.s3.region }}
AWS_DEFAULT_REGION: {{ . | quote }}
{{- end }}
{{- if .Values.mlflow.auth.enabled }}
{{- $secret := include "teefusion.mlflow.secret" . }}
MLFLOW_AUTH_CONFIG_PATH: /etc/mlflow/basic_auth.ini
MLFLOW_AUTH_ADMIN_USERNAME: {secretKeyRef: {name: {{ $secret | quote }}, key: MLFLOW_TRACKING_USERNAME}}
MLFLOW_AUTH_ADMIN_PASSWORD: {secretKeyRef: {name: {{ $secret | quote }}, key: MLFLOW_TRACKING_PASSWORD}}
MLFLOW_FLASK_SERVER_SECRET_KEY: {secretKeyRef: {name: {{ $secret | quote }}, key: MLFLOW_FLASK_SERVER_SECRET_KEY}}
DEFAULT_PERMISSION: {{ .Values.mlflow.auth.defaultPermission }}
{{- end }}
{{- end }}

{{/* Variables of a client in the MLflow image: the server's Service, and credentials. */}}
{{- define "teefusion.mlflow.clientEnv" -}}
MLFLOW_TRACKING_URI: {{ include "teefusion.mlflow.url" . }}
{{- include "teefusion.mlflow.credentials" . }}
{{- end }}
