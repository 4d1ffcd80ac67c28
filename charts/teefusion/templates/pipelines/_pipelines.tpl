{{/* Pod of something that talks to Kubeflow Pipelines. Takes root, name, command, and perhaps files (a ConfigMap), and
     workspace: whether it reads files there, such as prompts. A claim that is not bound yet would hold up a hook. */}}
{{- define "teefusion.pipelines.pod" -}}
{{- $values := .root.Values.pipelines -}}
{{- $claim := ternary (include "teefusion.workspace.claim" .root) "" (default false .workspace) -}}
{{- include "teefusion.pod" (dict "root" .root "values" $values "serviceAccount" .root.Values.runner.serviceAccount.name) }}
restartPolicy: Never
containers:
  - name: {{ .name }}
    image: {{ include "teefusion.image" (dict "root" .root "stage" "pipeline") }}
    imagePullPolicy: {{ .root.Values.image.pullPolicy }}
    command:
      {{- toYaml .command | nindent 6 }}
    envFrom:
      - configMapRef: {name: {{ .root.Values.settings.name | quote }}}
    env:
      {{- $env := include "teefusion.clientEnv" .root | fromYaml }}
      {{- $_ := set $env "KF_PIPELINES_ENDPOINT" $values.endpoint }}
      {{- if $values.token.enabled }}
      {{- $_ := set $env "KF_PIPELINES_SA_TOKEN_PATH" "/var/run/secrets/kubeflow/pipelines/token" }}
      {{- end }}
      {{- include "teefusion.env" (list $env $values.extraEnv) | trim | nindent 6 }}
    securityContext:
      {{- include "teefusion.containerSecurityContext" .root | nindent 6 }}
    resources:
      {{- toYaml $values.resources | nindent 6 }}
    volumeMounts:
      - {name: tmp, mountPath: /tmp}
      {{- if .files }}
      - {name: files, mountPath: /etc/teefusion, readOnly: true}
      {{- end }}
      {{- if $claim }}
      - {name: workspace, mountPath: {{ .root.Values.workspace.mountPath | quote }}}
      {{- end }}
      {{- if $values.token.enabled }}
      - {name: token, mountPath: /var/run/secrets/kubeflow/pipelines, readOnly: true}
      {{- end }}
volumes:
  - {name: tmp, emptyDir: {}}
  {{- with .files }}
  - name: files
    configMap: {name: {{ . | quote }}}
  {{- end }}
  {{- with $claim }}
  - name: workspace
    persistentVolumeClaim: {claimName: {{ . | quote }}}
  {{- end }}
  {{- if $values.token.enabled }}
  - name: token
    projected:
      sources:
        - serviceAccountToken: {path: token, expirationSeconds: 7200, audience: {{ $values.token.audience | quote }}}
  {{- end }}
{{- end }}

{{/* Pod that mounts the workspace as the user of steps, so that the kubelet lets this user's group in, and looks
     whether it did: not every driver can. Takes root, component. */}}
{{- define "teefusion.workspace.template" -}}
{{- $values := .root.Values -}}
metadata:
  labels:
    {{- include "teefusion.podLabels" . | nindent 4 }}
spec:
  {{- include "teefusion.pod" (dict "root" .root "values" $values.pipelines) | nindent 2 }}
  restartPolicy: Never
  containers:
    - name: workspace
      image: {{ include "teefusion.image" (dict "root" .root "stage" "pipeline") }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      command:
        - sh
        - -c
        - |
          made=$(mktemp "$0/.writable-XXXXXX") && exec rm "$made"
          echo "Steps of runs cannot write to the workspace: its driver sets no group. On the volume's server, give its" \
            "root to group $(id -g), and let the group write (chmod g+rwxs); then delete this Job, and upgrade." >&2
          exit 1
        - {{ $values.workspace.mountPath | quote }}
      securityContext:
        {{- include "teefusion.containerSecurityContext" .root | nindent 8 }}
      resources:
        {{- toYaml $values.workspace.prepare.resources | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: workspace, mountPath: {{ $values.workspace.mountPath | quote }}}
  volumes:
    - {name: tmp, emptyDir: {}}
    - name: workspace
      persistentVolumeClaim: {claimName: {{ include "teefusion.workspace.claim" .root | quote }}}
{{- end }}
