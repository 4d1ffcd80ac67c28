{{/* A pod of `helm test`. Takes root, name (of a script in files/tests), image, pullPolicy, env, and perhaps settings, account, token. */}}
{{- define "teefusion.test" -}}
---
apiVersion: v1
kind: Pod
metadata:
  {{- include "teefusion.metadata" (dict "root" .root "component" "test" "name" (printf "%s-test-%s" (include "teefusion.fullname" .root) .name) "labels" (include "teefusion.otherPodLabels" (dict "root" .root) | fromYaml)) | nindent 2 }}
  annotations:
    helm.sh/hook: test
    # Not hook-succeeded: most versions of Helm delete such pods before `--logs` asks for what they said (helm#9098).
    helm.sh/hook-delete-policy: before-hook-creation
spec:
  {{- include "teefusion.pod" (dict "root" .root "values" .root.Values.tests "serviceAccount" .account "token" .token) | nindent 2 }}
  restartPolicy: Never
  containers:
    - name: {{ .name }}
      image: {{ .image }}
      imagePullPolicy: {{ .pullPolicy }}
      command: [python, /opt/teefusion/{{ .name }}_check.py]
      {{- if .settings }}
      envFrom:
        - configMapRef: {name: {{ .root.Values.settings.name | quote }}}
      {{- end }}
      {{- with .env }}
      env:
        {{- include "teefusion.env" (list .) | trim | nindent 8 }}
      {{- end }}
      securityContext:
        {{- include "teefusion.containerSecurityContext" .root | nindent 8 }}
      resources:
        {{- toYaml .root.Values.tests.resources | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: scripts, mountPath: /opt/teefusion, readOnly: true}
  volumes:
    - {name: tmp, emptyDir: {}}
    - name: scripts
      configMap:
        name: {{ include "teefusion.fullname" .root }}-tests
{{ end }}
