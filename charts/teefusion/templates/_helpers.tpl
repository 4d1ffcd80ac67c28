{{/* Names. 36 characters leave room for the suffixes: a CronJob's name has at most 52. */}}
{{- define "teefusion.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- default $full .Values.fullnameOverride | trunc 36 | trimSuffix "-" -}}
{{- end }}

{{/* Name of a component's objects. Takes (dict "root" $ "component" "mlflow"), as all helpers of components do. */}}
{{- define "teefusion.componentName" -}}
{{- printf "%s-%s" (include "teefusion.fullname" .root) .component -}}
{{- end }}

{{- define "teefusion.selectorLabels" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride | quote }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* A version as labels take it: no build's +, and 63 characters at most. */}}
{{- define "teefusion.labelValue" -}}
{{- . | replace "+" "_" | trunc 63 | trimAll "-_." -}}
{{- end }}

{{- define "teefusion.labels" -}}
{{ include "teefusion.selectorLabels" . }}
app.kubernetes.io/version: {{ include "teefusion.labelValue" .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: teefusion
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ include "teefusion.labelValue" (printf "%s-%s" .root.Chart.Name .root.Chart.Version) | quote }}
{{- with merge (dict) (.labels | default dict) .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Labels of a pod beside those by which it is selected; the values' go over ours. Takes root, and perhaps own. An Istio
     sidecar keeps Jobs from ending and nodes of a TrainJob from meeting, and lets nobody in who has none, as steps' pods. */}}
{{- define "teefusion.otherPodLabels" -}}
{{ merge (dict) (.own | default dict) .root.Values.commonLabels (dict "sidecar.istio.io/inject" "false") | toYaml }}
{{- end }}

{{/* Of pods: nothing that changes with the chart's version, or each upgrade would start everything again. */}}
{{- define "teefusion.podLabels" -}}
{{ include "teefusion.selectorLabels" . }}
app.kubernetes.io/part-of: teefusion
{{ include "teefusion.otherPodLabels" . }}
{{- end }}

{{/* metadata of an object: name (the component's, unless given), namespace, labels (further ones, if given). */}}
{{- define "teefusion.metadata" -}}
name: {{ .name | default (include "teefusion.componentName" .) | quote }}
namespace: {{ .root.Release.Namespace | quote }}
labels:
  {{- include "teefusion.labels" . | nindent 2 }}
{{- end }}

{{/* An image from its values. */}}
{{- define "teefusion.imageOf" -}}
{{- $name := ternary .repository (printf "%s/%s" .registry .repository) (empty .registry) -}}
{{- ternary (printf "%s@%s" $name .digest) (printf "%s:%s" $name .tag) (not (empty .digest)) -}}
{{- end }}

{{/* Our image of a Dockerfile stage: pipeline, train or serve. Takes (dict "root" $ "stage" "train"). */}}
{{- define "teefusion.image" -}}
{{- $image := .root.Values.image -}}
{{- $tag := printf "%s-%s" (default .root.Chart.AppVersion $image.tag) .stage -}}
{{- include "teefusion.imageOf" (dict "registry" $image.registry "repository" $image.repository "tag" $tag "digest" (index $image.digests .stage)) -}}
{{- end }}

{{/* What all pods have: no token unless "token" is given, the restricted standard, and where they may run.
     Takes root, values (with the scheduling options), and perhaps serviceAccount, token, user. */}}
{{- define "teefusion.pod" -}}
{{- $ours := .root.Values.security.runAsUser -}}
{{- $user := ternary nil (default $ours .user) (empty $ours) -}}
automountServiceAccountToken: {{ .token | default false }}
{{- with .serviceAccount }}
serviceAccountName: {{ . | quote }}
{{- end }}
{{- /* Else each Service of the namespace became variables, such as TEEFUSION_MLFLOW_PORT. */}}
enableServiceLinks: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  {{- with $user }}
  runAsUser: {{ int64 . }}
  runAsGroup: {{ int64 . }}
  fsGroup: {{ int64 . }}
  fsGroupChangePolicy: OnRootMismatch
  {{- end }}
  seccompProfile:
    type: RuntimeDefault
{{- range $option := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" "priorityClassName" }}
{{- with index $.values $option }}
{{ $option }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{- define "teefusion.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Variables from maps of name to value, or to a source such as {secretKeyRef: ...}; later maps go over earlier ones.
     Name by name, as mergeOverwrite would give one variable two sources; and no number as 1e+06. Takes a list of maps. */}}
{{- define "teefusion.env" -}}
{{- $all := dict }}
{{- range $map := . }}
{{- range $name, $value := $map }}
{{- $_ := set $all $name $value }}
{{- end }}
{{- end }}
{{- range $name, $value := $all }}
- name: {{ $name | quote }}
  {{- if kindIs "map" $value }}
  valueFrom:
    {{- toYaml $value | nindent 4 }}
  {{- else }}
  value: {{ ternary $value (toJson $value) (kindIs "string" $value) | quote }}
  {{- end }}
{{- end }}
{{- end }}

{{/* {NAME: {secretKeyRef: ...}} for variables that are called as the keys of a Secret. */}}
{{- define "teefusion.secretEnv" -}}
{{- $secret := .secret -}}
{{- range .keys }}
{{ . }}: {secretKeyRef: {name: {{ $secret | quote }}, key: {{ . }}}}
{{- end }}
{{- range .optional }}
{{ . }}: {secretKeyRef: {name: {{ $secret | quote }}, key: {{ . }}, optional: true}}
{{- end }}
{{- end }}

{{/* The value that a Secret of ours has already, else a new one: an upgrade changes no password.
     Takes root, name, key, length. */}}
{{- define "teefusion.generated" -}}
{{- $found := lookup "v1" "Secret" .root.Release.Namespace .name -}}
{{- $data := (default dict $found).data | default dict -}}
{{- ternary (index $data .key | default "" | b64dec) (randAlphaNum (int .length)) (hasKey $data .key) -}}
{{- end }}

{{/* "true" where something is switched on, or is "auto" and the cluster has its API. Takes root, value, api. */}}
{{- define "teefusion.wanted" -}}
{{- if or (eq (toString .value) "true") (and (eq (toString .value) "auto") (.root.Capabilities.APIVersions.Has .api)) -}}
true
{{- end -}}
{{- end }}

{{/* The port of a URL: what it says, or its scheme's. Of no URL, that of https. A proxy may come without a scheme. */}}
{{- define "teefusion.port" -}}
{{- $url := urlParse (ternary . (printf "http://%s" .) (or (empty .) (contains "://" .))) -}}
{{- regexFind ":[0-9]+$" $url.host | trimPrefix ":" | default (ternary "80" "443" (eq $url.scheme "http")) -}}
{{- end }}

{{/* Where things are, for settings, pods and notes. */}}

{{- define "teefusion.s3.endpoint" -}}
{{- if .Values.seaweedfs.enabled -}}
http://{{ include "teefusion.componentName" (dict "root" . "component" "seaweedfs") }}.{{ .Release.Namespace }}.svc:8333
{{- else -}}
{{ .Values.s3.endpointUrl }}
{{- end -}}
{{- end }}

{{/* Name of the Secret with S3's credentials; empty where pods have a role instead. */}}
{{- define "teefusion.s3.secret" -}}
{{- if or .Values.s3.existingSecret .Values.seaweedfs.enabled -}}
{{ default "teefusion-s3" .Values.s3.existingSecret }}
{{- end -}}
{{- end }}

{{- define "teefusion.s3.uri" -}}
s3://{{ .Values.s3.bucket }}{{ with .Values.s3.prefix }}/{{ trimAll "/" . }}{{ end }}
{{- end }}

{{- define "teefusion.mlflow.url" -}}
{{- if .Values.mlflow.enabled -}}
http://{{ include "teefusion.componentName" (dict "root" . "component" "mlflow") }}.{{ .Release.Namespace }}.svc:5000
{{- else -}}
{{ .Values.mlflow.externalUrl }}
{{- end -}}
{{- end }}

{{/* Name of the Secret with MLflow's credentials; empty where it asks for none. */}}
{{- define "teefusion.mlflow.secret" -}}
{{- if or .Values.mlflow.auth.existingSecret (and .Values.mlflow.enabled .Values.mlflow.auth.enabled) -}}
{{ default "teefusion-mlflow" .Values.mlflow.auth.existingSecret }}
{{- end -}}
{{- end }}

{{/* Variables with which a client shows MLflow who it is: ours wants a user, another server perhaps a token. */}}
{{- define "teefusion.mlflow.credentials" -}}
{{- $user := list "MLFLOW_TRACKING_USERNAME" "MLFLOW_TRACKING_PASSWORD" }}
{{- with include "teefusion.mlflow.secret" . }}
{{- $keys := ternary (dict "keys" $user) (dict "optional" (append $user "MLFLOW_TRACKING_TOKEN")) $.Values.mlflow.enabled }}
{{- include "teefusion.secretEnv" (merge (dict "secret" .) $keys) }}
{{- end }}
{{- end }}

{{- define "teefusion.workspace.claim" -}}
{{- if .Values.workspace.enabled -}}{{ default "teefusion-work" .Values.workspace.existingClaim }}{{- end -}}
{{- end }}

{{/* Variables with which a client finds S3, MLflow and the hub: references to Secrets, by the names pods know. */}}
{{- define "teefusion.clientEnv" -}}
{{- with include "teefusion.s3.secret" . }}
{{- include "teefusion.secretEnv" (dict "secret" . "keys" (list "TEEFUSION_S3_ACCESS_KEY_ID" "TEEFUSION_S3_SECRET_ACCESS_KEY") "optional" (list "TEEFUSION_S3_SESSION_TOKEN")) }}
{{- end }}
{{- include "teefusion.mlflow.credentials" . }}
{{- with .Values.hub.existingSecret }}
{{- include "teefusion.secretEnv" (dict "secret" . "keys" (list "HF_TOKEN")) }}
{{- end }}
MLFLOW_DISABLE_TELEMETRY: "true"
HOME: /tmp
{{- end }}

{{/* The claim `data` of a StatefulSet: only labels that never change, as the template cannot. */}}
{{- define "teefusion.dataClaim" -}}
- metadata:
    name: data
    labels:
      {{- include "teefusion.selectorLabels" . | nindent 6 }}
  spec:
    accessModes: [ReadWriteOnce]
    {{- with .storage.className }}
    storageClassName: {{ . | quote }}
    {{- end }}
    resources:
      requests:
        storage: {{ .storage.size }}
{{- end }}
