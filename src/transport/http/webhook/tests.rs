use super::*;

#[test]
fn P5_silence_is_the_receiver_s_fault_until_others_had_success_since() {
    let silence = Silence::default();
    // The receiver hangs.
    for id in ["a", "b", "a", "c", "b"] {
        assert!(!silence.is_its_fault(id, silence.successes()), "{id}");
    }
    // It is back; `a` still gets nothing.
    silence.broken("b", true);
    assert!(silence.is_its_fault("a", silence.successes()));
    assert!(!silence.is_its_fault("d", silence.successes()), "nothing went well since d began");
    // An answer of any kind ends it.
    silence.broken("a", false);
    assert!(!silence.is_its_fault("a", silence.successes()));
    // Something went well while it waited.
    let began = silence.successes();
    silence.broken("b", true);
    assert!(silence.is_its_fault("e", began));
    for n in 0..2 * MAX_SILENT {
        silence.is_its_fault(&n.to_string(), 0);
    }
    assert_eq!(silence.waiting().len(), MAX_SILENT);
}

#[tokio::test]
async fn what_is_given_in_place_is_checked_at_once_and_nothing_is_consumed() {
    let inline = |text: &str| Secret::Inline(text.to_owned());
    let refused = |options| WebhookTransport::new(options).unwrap_err().to_string();
    assert!(refused(WebhookOptions::new(inline("nats://h"))).contains("not a web address"));
    let options = WebhookOptions::new(inline("https://h"));
    let secret = Some(inline("whsec_AAAA"));
    assert!(refused(WebhookOptions { secret, ..options.clone() }).contains("24 to 64"));
    let transport = WebhookTransport::new(options).unwrap();
    let spec = SourceSpec {
        name: "x".into(),
        params: serde_json::Value::Null,
        competing: false,
        resume: None,
        reporter: crate::transport::Reporter::new("x"),
    };
    let consumer = transport.consumer(spec).await;
    assert!(matches!(consumer, Err(TransportError::Misconfigured(_))));
}
