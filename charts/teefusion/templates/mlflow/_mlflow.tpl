{{- define "teefusion.mlflow.databaseSecret" -}}
{{- if .Values.postgresql.enabled -}}
name: {{ include "teefusion.componentName" (dict "root" . "component" "postgresql") }}
key: uri
{{- else -}}
name: {{ .Values.mlflow.database.existingSecret }}
key: {{ .Values.mlflow.database.key }}
{{- end -}}
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
{{- if .Values.mlflow.ingress.enabled -}}
{{- $hosts = append $hosts .Values.mlflow.ingress.host -}}
{{- end -}}
{{- concat $hosts .Values.mlflow.allowedHosts | join "," -}}
{{- end }}

{{/* Variables of everything that runs in the MLflow image. */}}
{{- define "teefusion.mlflow.env" -}}
MLFLOW_BACKEND_STORE_URI:
  secretKeyRef:
    {{- include "teefusion.mlflow.databaseSecret" . | nindent 4 }}
MLFLOW_DISABLE_TELEMETRY: "true"
HOME: /tmp
USER: mlflow
{{- with include "teefusion.s3.secret" . }}
AWS_ACCESS_KEY_ID: {secretKeyRef: {name: {{ . }}, key: TEEFUSION_S3_ACCESS_KEY_ID}}
AWS_SECRET_ACCESS_KEY: {secretKeyRef: {name: {{ . }}, key: TEEFUSION_S3_SECRET_ACCESS_KEY}}
AWS_SESSION_TOKEN: {secretKeyRef: {name: {{ . }}, key: TEEFUSION_S3_SESSION_TOKEN, optional: true}}
{{- end }}
{{- with include "teefusion.s3.endpoint" . }}
MLFLOW_S3_ENDPOINT_URL: {{ . }}
{{- end }}
{{- with .Values.s3.region }}
AWS_DEFAULT_REGION: {{ . }}
{{- end }}
{{- if .Values.mlflow.auth.enabled }}
{{- $secret := include "teefusion.mlflow.secret" . }}
MLFLOW_AUTH_CONFIG_PATH: /etc/mlflow/basic_auth.ini
MLFLOW_AUTH_ADMIN_USERNAME: {secretKeyRef: {name: {{ $secret }}, key: MLFLOW_TRACKING_USERNAME}}
MLFLOW_AUTH_ADMIN_PASSWORD: {secretKeyRef: {name: {{ $secret }}, key: MLFLOW_TRACKING_PASSWORD}}
MLFLOW_FLASK_SERVER_SECRET_KEY: {secretKeyRef: {name: {{ $secret }}, key: MLFLOW_FLASK_SERVER_SECRET_KEY}}
DEFAULT_PERMISSION: {{ .Values.mlflow.auth.defaultPermission }}
{{- end }}
{{- end }}

{{/* Variables of a client in the MLflow image: the server's Service, and credentials. */}}
{{- define "teefusion.mlflow.clientEnv" -}}
MLFLOW_TRACKING_URI: {{ include "teefusion.mlflow.url" . }}
{{- with include "teefusion.mlflow.secret" . }}
{{- include "teefusion.secretEnv" (dict "secret" . "keys" (list "MLFLOW_TRACKING_USERNAME" "MLFLOW_TRACKING_PASSWORD")) }}
{{- end }}
{{- end }}
