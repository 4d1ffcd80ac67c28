{{/* An Ingress to the component's Service. Takes root, component, ingress, port (its name). */}}
{{- define "teefusion.ingress" -}}
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata:
  {{- include "teefusion.metadata" . | nindent 2 }}
  {{- with .ingress.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- with .ingress.className }}
  ingressClassName: {{ . | quote }}
  {{- end }}
  {{- if .ingress.tls.enabled }}
  tls:
    - hosts: [{{ .ingress.host | quote }}]
      secretName: {{ default (printf "%s-tls" (include "teefusion.componentName" .)) .ingress.tls.secretName | quote }}
  {{- end }}
  rules:
    - host: {{ .ingress.host | quote }}
      http:
        paths:
          - path: /
            pathType: Prefix
            backend:
              service:
                name: {{ include "teefusion.componentName" . }}
                port: {name: http}
{{- end }}
