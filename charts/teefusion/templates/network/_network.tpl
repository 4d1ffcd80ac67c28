{{/* A policy for a component's pods. Takes root, component, and perhaps ingress and egress, each a list of rules. */}}
{{- define "teefusion.policy" -}}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  {{- include "teefusion.metadata" . | nindent 2 }}
spec:
  podSelector:
    matchLabels:
      {{- include "teefusion.selectorLabels" . | nindent 6 }}
  policyTypes: [Ingress, Egress]
  {{- with .ingress }}
  ingress:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .egress }}
  egress:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{ end }}

{{/* The pods of one of our components, as a peer. */}}
{{- define "teefusion.peer" -}}
podSelector:
  matchLabels:
    {{- include "teefusion.selectorLabels" . | nindent 4 }}
{{- end }}

{{/* To something outside: any of the addresses, at the ports. No address given is every one, and no port those of its URL
     and of the proxies that settings.env names. Takes root, url, outside (ports and cidrs). */}}
{{- define "teefusion.outside" -}}
{{- $ports := .outside.ports -}}
{{- if not $ports -}}
{{- $ports = list (include "teefusion.port" (.url | default "")) -}}
{{- range list "HTTP_PROXY" "HTTPS_PROXY" "http_proxy" "https_proxy" -}}
{{- with index $.root.Values.settings.env . -}}
{{- $ports = append $ports (include "teefusion.port" .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
ports:
  {{- range uniq $ports }}
  - {protocol: TCP, port: {{ . }}}
  {{- end }}
{{- with .outside.cidrs }}
to:
  {{- range . }}
  - ipBlock: {cidr: {{ . | quote }}}
  {{- end }}
{{- end }}
{{- end }}

{{/* To a component of ours, or to what stands in its place. Takes root, enabled, component, port, url, outside. */}}
{{- define "teefusion.inOrOut" -}}
{{- if .enabled -}}
ports:
  - {protocol: TCP, port: {{ .port }}}
to:
  - {{- include "teefusion.peer" . | nindent 4 }}
{{- else -}}
{{- include "teefusion.outside" . -}}
{{- end -}}
{{- end }}

{{/* From pods of this namespace, and of the namespaces with these labels. Takes port, namespaces (label selectors). */}}
{{- define "teefusion.from" -}}
ports:
  - {protocol: TCP, port: {{ .port }}}
from:
  - podSelector: {}
  {{- range .namespaces }}
  - namespaceSelector:
      {{- toYaml . | nindent 6 }}
  {{- end }}
{{- end }}
